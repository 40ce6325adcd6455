"""What a stage keeps and allocates under another backend than the default, modelled and for real."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from muxtune.batches import HTaskShape, layout_step
from muxtune.costs.compose import MicrobatchWork
from muxtune.graph.attention_backends import kept_calls
from muxtune.memory import backward_workspace_bytes, forward_workspace_bytes, kept_bytes
from muxtune.model import PRESETS
from muxtune.tasks import Example
from runtime.backbone.hugging_face import load_hf_model
from runtime.backbone.stage import Stage
from runtime.data.batch import build_microbatch
from runtime.device.allocations import AllocationTrace, SavedBytes
from runtime.tasks.adapter_files import initial_adapter, load_adapter
from tests.plans import make_task
from tests.runtime.attention.stand_ins import let_every_backend_run
from tests.runtime.saved import saved_bytes

STREAMS = ([64, 64, 64, 64], [40, 31, 17, 33, 120, 90])


def layouts_of(lengths):
    shape = HTaskShape(alignment="pack", row_tokens=None, microbatches=1, tokens=sum(lengths))
    (layout,) = layout_step(shape, [np.array(lengths)])
    return layout, [[Example(np.ones(n, dtype=np.int64), n - 2) for n in lengths]]


def make_stage(model, targets, tmp_path):
    task = make_task("a", peft={"method": "lora", "r": 4, "alpha": 8, "targets": targets})
    stage = Stage(model, range(model.layers), first=False, last=False, weights=load_hf_model(model))
    initial_adapter(model, task, tmp_path / "a")
    stage.add_task(task, load_adapter(tmp_path / "a"))
    return stage, task


def run(stage, batch, model):
    """Bytes saved, and most bytes of forward and backward."""
    hidden = torch.randn(len(batch.tokens_T), model.hidden, requires_grad=True)
    with SavedBytes(stage) as saved:
        stage(batch, hidden)
    with AllocationTrace() as forward:
        outputs = [stage(batch, hidden)]
    gradient = torch.ones_like(outputs[0])
    with AllocationTrace() as backward:
        torch.autograd.backward(outputs.pop(), gradient)
    return saved.bytes, forward.peak_bytes, forward.net_bytes + backward.peak_bytes


@pytest.mark.parametrize("lengths", STREAMS, ids=["equal", "ragged"])
@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama-tiny", ("all-linear",)), ("llama-tiny", ("q_proj", "v_proj")), ("gpt2-tiny", ("all-linear",))],
)
def test_the_loop_is_modelled_within_3_percent(name, targets, lengths, tmp_path):
    model = PRESETS[name].model_copy(update={"layers": 2})
    stage, task = make_stage(model, targets, tmp_path)
    layout, batches = layouts_of(lengths)
    measured = run(stage, build_microbatch(layout, batches, task_ids=["a"], attention="loop"), model)
    work = MicrobatchWork(
        tokens=layout.tokens,
        task_tokens=(layout.tokens,),
        pefts=(task.peft,),
        attention=tuple((1.0, *call) for call in kept_calls(lengths, "loop")),
        targets=0,
    )
    message = layout.tokens * model.hidden * model.dtype_bytes  # the input was there before
    kept = kept_bytes(model, 2, first=False, last=False, work=work).total_bytes - message
    modelled = (
        saved_bytes(model, 2, first=False, last=False, work=work),
        kept + forward_workspace_bytes(model, last=False, work=work),
        kept + backward_workspace_bytes(model, last=False, work=work),
    )
    assert measured == pytest.approx(modelled, rel=0.03)


@pytest.mark.parametrize("lengths", STREAMS, ids=["equal", "ragged"])
def test_one_row_of_all_sequences_is_the_stream_where_it_has_no_holes(lengths, monkeypatch, tmp_path):
    """What lies around the kernel of ``varlen``; the stand-in for the kernel keeps more than that does."""
    let_every_backend_run(monkeypatch)
    model = PRESETS["gpt2-tiny"].model_copy(update={"layers": 1})
    layout, batches = layouts_of(lengths)
    batch = build_microbatch(layout, batches, task_ids=["a"], attention="varlen")
    (group,) = batch.attention.placement.layout.groups
    ((_, slots),) = kept_calls(lengths, "varlen")
    assert group.rows * group.length == slots == layout.tokens
    assert group.index is None
    assert batch.attention.placement.layout.restore is None
    stage, _ = make_stage(model, ("c_attn",), tmp_path)
    stage(batch, torch.randn(layout.tokens, model.hidden)).sum().backward()
