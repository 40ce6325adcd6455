"""Bytes of micro-batches whose sequences go on in later ones: modelled, and kept by autograd for real."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from muxtune.batches import HTaskShape, attention_calls, layout_step
from muxtune.costs.compose import MicrobatchWork
from muxtune.memory import (
    backward_workspace_bytes,
    carried_gradient_bytes,
    carried_kv_bytes,
    forward_workspace_bytes,
)
from muxtune.model import PRESETS
from muxtune.tasks import Example
from runtime.attention.carried_kv import CarriedKv
from runtime.backbone.hugging_face import load_hf_model
from runtime.backbone.stage import Stage
from runtime.data.batch import build_microbatch
from runtime.device.allocations import AllocationTrace, SavedBytes
from runtime.tasks.adapter_files import initial_adapter, load_adapter
from tests.muxtune.batches.carried import carried_attention_calls, carried_out_tokens
from tests.plans import make_task
from tests.runtime.saved import saved_bytes

LENGTHS = {32: [150, 96, 40, 170, 33], 64: [500, 480]}
"""Per chunk length: many calls per micro-batch, and one that fills it."""


def works_of(layouts, task) -> list[MicrobatchWork]:
    return [
        MicrobatchWork(
            tokens=layout.tokens,
            task_tokens=tuple(span.stop - span.start for span in layout.spans),
            pefts=(task.peft,),
            attention=tuple((1.0, *call) for call in attention_calls(layout)),
            carried_attention=tuple((1.0, *call) for call in carried_attention_calls(layout)),
            left_tokens=carried_out_tokens(layout),
            targets=0,
        )
        for layout in layouts
    ]


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
@pytest.mark.parametrize(("carry", "chunk"), [(2, 32), (4, 32), (4, 64)])
def test_a_carry_group_keeps_and_allocates_what_is_modelled(name, carry, chunk, tmp_path):
    model = PRESETS[name].model_copy(update={"layers": 2})
    task = make_task("a", peft={"method": "lora", "r": 4, "alpha": 8, "targets": ("all-linear",)})
    stage = Stage(model, range(model.layers), first=False, last=False, weights=load_hf_model(model))
    initial_adapter(model, task, tmp_path / task.id)
    stage.add_task(task, load_adapter(tmp_path / task.id))
    lengths = LENGTHS[chunk]
    tokens = -(-sum(-(-length // chunk) for length in lengths) // carry) * chunk
    shape = HTaskShape(alignment="chunk", row_tokens=chunk, microbatches=carry, tokens=tokens, carry=carry)
    layouts = layout_step(shape, [np.array(lengths)])
    batch = [Example(np.ones(length, dtype=np.int64), length - 1) for length in lengths]

    carried = CarriedKv()
    saved, peaks, outputs, inputs = [], [], [], []
    for number, layout in enumerate(layouts):
        tensors = build_microbatch(layout, [batch], task_ids=["a"], carried=carried, earlier=layouts[:number])
        inputs.append(torch.randn(tokens, model.hidden, requires_grad=True))
        with AllocationTrace() as trace, SavedBytes(stage) as counted:
            outputs.append(stage(tensors, inputs[-1]))
        saved.append(counted.bytes)
        peaks.append(trace.peak_bytes - trace.net_bytes)
    del carried, tensors
    backward, changes = [], []
    while outputs:
        with AllocationTrace() as trace:
            output = outputs.pop()
            torch.autograd.backward(output, torch.ones_like(output))
            del output
        backward.append(trace.peak_bytes)
        changes.append(trace.net_bytes)

    works = works_of(layouts, task)
    assert works[0].left_tokens > 0
    for work, counted_bytes, forward_peak, backward_peak in zip(
        works, saved, peaks, reversed(backward), strict=True
    ):
        kept = saved_bytes(model, model.layers, first=False, last=False, work=work)
        left = carried_kv_bytes(model, model.layers, tokens=work.left_tokens)
        assert counted_bytes == pytest.approx(kept + left, rel=0.005)
        modelled = forward_workspace_bytes(model, last=False, work=work)
        assert forward_peak == pytest.approx(modelled, rel=0.01)
        modelled = backward_workspace_bytes(model, last=False, work=work)
        gradient = tokens * model.hidden * model.dtype_bytes  # of the output; a message in a run
        assert backward_peak == pytest.approx(modelled + gradient, rel=0.05)
    # The last backward frees what its micro-batch kept and the carry group's gradients, for its input's.
    freed = inputs[0].nbytes - saved[0] - changes[-1]
    assert freed == pytest.approx(carried_gradient_bytes(model, model.layers, works=works), rel=0.01)
