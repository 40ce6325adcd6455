"""The memory model of the domain against the bytes that autograd really keeps and torch really allocates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from muxtune.batches import Alignment, HTaskShape, attention_calls, layout_step
from muxtune.costs.compose import MicrobatchWork
from muxtune.memory import (
    backbone_bytes,
    backward_workspace_bytes,
    forward_workspace_bytes,
    kept_bytes,
    table_bytes,
)
from muxtune.model import PRESETS, ModelSpec
from muxtune.peft import extra
from muxtune.tasks import Example
from runtime.backbone.held_bytes import parameter_bytes, rotary_table_bytes
from runtime.backbone.hugging_face import load_hf_model
from runtime.backbone.stage import Stage
from runtime.data.batch import build_microbatch
from runtime.device.allocations import AllocationTrace, SavedBytes
from runtime.tasks.adapter_files import initial_adapter, load_adapter
from tests.muxtune.batches.carried import carried_attention_calls
from tests.plans import make_task
from tests.runtime.saved import saved_bytes

ALL = ("all-linear",)


@dataclass(frozen=True)
class Bytes:
    """Of one micro-batch."""

    saved: int
    forward_peak: int
    """Beyond what was there before, the input included."""
    backward_peak: int
    """Likewise."""


def measure(
    model: ModelSpec,
    tmp_path,
    *,
    targets: tuple[str, ...],
    lengths,
    alignment: Alignment,
    first: bool,
    last: bool,
    targets_per_sequence: int = 2,
    rates: tuple[float, float] = (0.0, 0.0),
    methods: tuple[dict[str, object], ...] = ({}, {}),
    other: dict[str, object] | None = None,
) -> tuple[Bytes, Bytes]:
    """Measured and modelled bytes of one micro-batch of two tasks; ``other`` is the first one's method."""
    pefts = {"method": "lora", "alpha": 8, "targets": targets}
    tasks = [
        make_task(name, peft=own or pefts | {"r": r, "dropout": rate})
        for name, r, rate, own in zip("ab", (4, 16), rates, methods, strict=True)
    ]
    if other is not None:
        tasks[0] = make_task("a", peft=other)
    stage = Stage(model, range(model.layers), first=first, last=last, weights=load_hf_model(model))
    for task in tasks:
        initial_adapter(model, task, tmp_path / task.id)
        stage.add_task(task, load_adapter(tmp_path / task.id))
    row = {"pad": max(map(max, lengths)), "pack": None, "chunk": 64}[alignment]
    sizes = {"pad": row, "pack": 0, "chunk": 64}[alignment]
    tokens = sum(sum(each) if alignment == "pack" else len(each) * sizes for each in lengths)
    shape = HTaskShape(alignment=alignment, row_tokens=row, microbatches=1, tokens=tokens)
    (layout,) = layout_step(shape, [np.array(each) for each in lengths])
    extras = [extra(task.peft) for task in tasks]
    fronts = [each.keys for each in extras]
    batches = [
        [Example(np.ones(n, dtype=np.int64), n - targets_per_sequence) for n in each - in_front.rows]
        for each, in_front in zip(map(np.array, lengths), extras, strict=True)
    ]
    batch = build_microbatch(
        layout,
        batches,
        task_ids=["a", "b"],
        extras=extras,
        dropout_seeds={i: 0 for i, rate in enumerate(rates) if rate},
    )
    dtype = getattr(torch, model.dtype)
    hidden = None if first else torch.randn(tokens, model.hidden, dtype=dtype, requires_grad=True)
    with SavedBytes(stage) as saved:
        output = stage(batch, hidden)
    assert output.requires_grad
    del output
    with AllocationTrace() as forward:
        outputs = [stage(batch, hidden)]
    gradient = None if last else torch.ones_like(outputs[0])
    with AllocationTrace() as backward:
        output = outputs.pop()
        torch.autograd.backward(output.sum() if last else output, gradient)
        del output
    measured = Bytes(saved.bytes, forward.peak_bytes, forward.net_bytes + backward.peak_bytes)
    work = MicrobatchWork(
        tokens=tokens,
        task_tokens=tuple(span.stop - span.start for span in layout.spans),
        pefts=tuple(task.peft for task in tasks),
        attention=tuple((1.0, *call) for call in attention_calls(layout, fronts)),
        carried_attention=tuple((1.0, *call) for call in carried_attention_calls(layout, fronts)),
        targets=targets_per_sequence * sum(map(len, lengths)),
    )
    assert parameter_bytes(stage) == backbone_bytes(model, model.layers, first=first, last=last)
    assert rotary_table_bytes(stage) == table_bytes(model)
    kept = kept_bytes(model, model.layers, first=first, last=last, work=work).total_bytes
    kept -= 0 if hidden is None else hidden.nbytes  # was there before
    modelled = Bytes(
        saved_bytes(model, model.layers, first=first, last=last, work=work),
        kept + forward_workspace_bytes(model, last=last, work=work),
        kept + backward_workspace_bytes(model, last=last, work=work),
    )
    return measured, modelled


def assert_close(modelled: Bytes, measured: Bytes, rel: float) -> None:
    assert modelled.saved == pytest.approx(measured.saved, rel=rel)
    assert modelled.forward_peak == pytest.approx(measured.forward_peak, rel=rel)
    assert modelled.backward_peak == pytest.approx(measured.backward_peak, rel=rel)


@pytest.mark.parametrize("alignment", ["pad", "pack", "chunk"])
@pytest.mark.parametrize(("first", "last"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama-tiny", ALL),
        ("llama-tiny", ("q_proj", "v_proj")),
        ("llama-tiny", ("o_proj", "down_proj")),
        ("gpt2-tiny", ALL),
        ("gpt2-tiny", ("c_attn",)),
        ("opt-tiny", ALL),
        ("opt-tiny", ("q_proj", "fc1")),
        ("opt-tiny", ("fc2",)),
    ],
)
def test_what_is_kept_and_allocated_is_modelled_within_2_percent(
    name, targets, first, last, alignment, tmp_path
):
    model = PRESETS[name].model_copy(update={"layers": 2})
    lengths = [[40, 31, 17, 33], [64, 50, 12]]
    measured, modelled = measure(
        model, tmp_path, targets=targets, lengths=lengths, alignment=alignment, first=first, last=last
    )
    assert_close(modelled, measured, rel=0.02)


@pytest.mark.parametrize(("first", "last"), [(True, False), (False, True)])
@pytest.mark.parametrize(
    ("name", "dtype", "targets"),
    [
        ("llama-tiny", "float32", ALL),
        ("llama-tiny", "float32", ("q_proj", "v_proj")),
        ("llama-tiny", "bfloat16", ALL),
        ("gpt2-tiny", "float32", ALL),
        ("opt-tiny", "float32", ("fc2",)),
    ],
)
def test_with_dropout_it_is_modelled_within_3_percent(name, dtype, targets, first, last, tmp_path):
    model = PRESETS[name].model_copy(update={"layers": 2, "dtype": dtype})
    measured, modelled = measure(
        model,
        tmp_path,
        targets=targets,
        lengths=[[64, 50, 40, 31, 60], [33]],
        alignment="pack",
        first=first,
        last=last,
        rates=(0.1, 0.0),
    )
    assert_close(modelled, measured, rel=0.03)


METHODS = [
    (
        "llama-tiny",
        {"method": "ia3", "targets": ["k_proj", "v_proj", "down_proj"], "feedforward": ["down_proj"]},
    ),
    ("gpt2-tiny", {"method": "ia3", "targets": ["c_attn", "mlp.c_proj"], "feedforward": ["mlp.c_proj"]}),
    ("opt-tiny", {"method": "ia3", "targets": ["q_proj", "k_proj", "fc2"]}),
    ("gpt2-tiny", {"method": "bitfit"}),
    ("opt-tiny", {"method": "shira", "r": 8, "targets": ["all-linear"]}),
    ("gpt2-tiny", {"method": "diff", "density": 0.05, "targets": ["all-linear"]}),
]


@pytest.mark.parametrize(("first", "last"), [(True, False), (False, True)])
@pytest.mark.parametrize(("name", "method"), METHODS)
@pytest.mark.parametrize("beside", [{}, None], ids=["beside LoRA", "alone"])
def test_other_methods_are_modelled_within_3_percent(name, method, beside, first, last, tmp_path):
    model = PRESETS[name].model_copy(update={"layers": 2})
    measured, modelled = measure(
        model,
        tmp_path,
        targets=ALL,
        lengths=[[64, 50, 40, 31, 60], [33]],
        alignment="pack",
        first=first,
        last=last,
        methods=(method, method if beside is None else beside),
    )
    assert_close(modelled, measured, rel=0.03)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes_are_modelled_within_3_percent(dtype, tmp_path):
    model = PRESETS["llama-tiny"].model_copy(update={"layers": 2, "dtype": dtype})
    measured, modelled = measure(
        model, tmp_path, targets=ALL, lengths=[[40, 31], [64]], alignment="pack", first=False, last=False
    )
    assert_close(modelled, measured, rel=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
def test_many_targets_of_a_large_vocabulary_are_modelled_within_2_percent(name, dtype, tmp_path):
    model = PRESETS[name].model_copy(update={"layers": 2, "dtype": dtype, "vocab": 4000})
    measured, modelled = measure(
        model,
        tmp_path,
        targets=ALL,
        lengths=[[40, 31], [64]],
        alignment="pad",
        first=False,
        last=True,
        targets_per_sequence=30,
    )
    assert_close(modelled, measured, rel=0.02)


BOTTLENECKS = [
    {"size": 16},
    {"size": 8, "blocks": ["mlp"]},
    {"size": 16, "placement": "parallel"},
    {"size": 8, "placement": "parallel", "blocks": ["attention"], "layers": [1]},
]


@pytest.mark.parametrize(("first", "last"), [(True, False), (False, True)])
@pytest.mark.parametrize("fields", BOTTLENECKS, ids=str)
@pytest.mark.parametrize(
    ("name", "dtype"), [("llama-tiny", "float32"), ("gpt2-tiny", "float32"), ("llama-tiny", "bfloat16")]
)
def test_bottlenecks_beside_lora_are_modelled_within_3_percent(name, dtype, fields, first, last, tmp_path):
    model = PRESETS[name].model_copy(update={"layers": 2, "dtype": dtype})
    measured, modelled = measure(
        model,
        tmp_path,
        targets=("q_proj",) if name == "llama-tiny" else ("c_attn",),
        lengths=[[40, 31, 17, 33], [64, 50, 12]],
        alignment="pack",
        first=first,
        last=last,
        other={"method": "bottleneck", **fields},
    )
    # Beside a bfloat16 backbone the norms and LoRA are modelled that coarsely, whatever stands beside them.
    assert modelled.saved == pytest.approx(measured.saved, rel=0.002 if dtype == "float32" else 0.01)
    assert_close(modelled, measured, rel=0.03)


LORA_VARIANTS = [
    {"use_dora": True},
    {"bias": "lora_only"},
    {"use_dora": True, "dropout": 0.1},
    {"use_dora": True, "bias": "lora_only", "rank_pattern": {".*": 2}},
]


@pytest.mark.parametrize(("first", "last"), [(True, False), (False, True)])
@pytest.mark.parametrize("fields", LORA_VARIANTS, ids=str)
@pytest.mark.parametrize(
    ("name", "dtype", "targets"),
    [
        ("llama-tiny", "float32", ("q_proj", "down_proj")),
        ("gpt2-tiny", "float32", ALL),
        ("llama-tiny", "bfloat16", ALL),
    ],
)
def test_variants_of_lora_are_modelled_nearly(name, dtype, targets, fields, first, last, tmp_path):
    model = PRESETS[name].model_copy(update={"layers": 2, "dtype": dtype})
    measured, modelled = measure(
        model,
        tmp_path,
        targets=targets,
        lengths=[[40, 31, 17, 33], [64, 50, 12]],
        alignment="pack",
        first=first,
        last=last,
        rates=(float(fields.get("dropout", 0.0)), 0.0),
        other={"method": "lora", "r": 4, "alpha": 8, "targets": targets, **fields},
    )
    # With dropout the backward's temporaries are counted as LoRA's, which are more.
    assert_close(modelled, measured, rel=0.09 if "dropout" in fields else 0.05)


@pytest.mark.parametrize(("first", "last"), [(True, False), (False, True)])
@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
@pytest.mark.parametrize(
    ("name", "dtype", "alignment"),
    [("llama-tiny", "float32", "pack"), ("llama-tiny", "bfloat16", "pad"), ("gpt2-tiny", "float32", "chunk")],
)
def test_virtual_tokens_beside_lora_are_modelled_within_5_percent(
    name, dtype, alignment, method, first, last, tmp_path
):
    model = PRESETS[name].model_copy(update={"layers": 2, "dtype": dtype})
    measured, modelled = measure(
        model,
        tmp_path,
        targets=ALL,
        lengths=[[40, 31, 17, 33], [64, 50, 12]],
        alignment=alignment,
        first=first,
        last=last,
        other={"method": method, "num_virtual_tokens": 8},
    )
    # Temporaries of bfloat16 count the longest span of all tasks, that of virtual tokens included.
    assert_close(modelled, measured, rel=0.05 if dtype == "bfloat16" else 0.03)
