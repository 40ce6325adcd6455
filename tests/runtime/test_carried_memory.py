"""Bytes of micro-batches whose sequences go on in later ones: modelled, and kept by autograd for real."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from muxtune.alignment import (
    HTaskShape,
    attention_calls,
    carried_attention_calls,
    carried_out_tokens,
    layout_step,
)
from muxtune.costs.compose import MicrobatchWork
from muxtune.dataset import Example
from muxtune.memory import backward_workspace_bytes, carried_kv_bytes, forward_workspace_bytes, saved_bytes
from muxtune.model import PRESETS
from runtime.adapters import initial_adapter, load_adapter
from runtime.backbone import Stage, load_hf_model
from runtime.batch import build_microbatch
from runtime.carry import CarriedKv
from runtime.memory import AllocationTrace, SavedBytes
from tests.plans import make_task

CHUNK = 32
LENGTHS = [150, 96, 40, 170, 33]


def works_of(layouts, task) -> list[MicrobatchWork]:
    left = sum(carried_out_tokens(layout) for layout in layouts)
    return [
        MicrobatchWork(
            tokens=layout.tokens,
            task_tokens=tuple(span.stop - span.start for span in layout.spans),
            loras=(task.peft,),
            attention=tuple((1.0, *call) for call in attention_calls(layout)),
            carried_attention=tuple((1.0, *call) for call in carried_attention_calls(layout)),
            carried_tokens=left,
            targets=0,
        )
        for layout in layouts
    ]


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
@pytest.mark.parametrize("carry", [2, 4])
def test_a_carry_group_keeps_and_allocates_what_is_modelled(name, carry, tmp_path):
    model = PRESETS[name].model_copy(update={"layers": 2})
    task = make_task("a", peft={"method": "lora", "r": 4, "alpha": 8, "targets": ("all-linear",)})
    stage = Stage(model, range(model.layers), first=False, last=False, weights=load_hf_model(model))
    initial_adapter(model, task, tmp_path / task.id)
    stage.add_task(task, load_adapter(tmp_path / task.id))
    chunks = sum(-(-length // CHUNK) for length in LENGTHS)
    tokens = -(-chunks // carry) * CHUNK
    shape = HTaskShape(alignment="chunk", row_tokens=CHUNK, microbatches=carry, tokens=tokens, carry=carry)
    layouts = layout_step(shape, [np.array(LENGTHS)])
    batch = [Example(np.ones(length, dtype=np.int64), length - 1) for length in LENGTHS]

    carried = CarriedKv()
    saved, peaks, outputs, inputs = [], [], [], []
    for number, layout in enumerate(layouts):
        tensors = build_microbatch(layout, [batch], task_ids=["a"], carried=carried, earlier=layouts[:number])
        inputs.append(torch.randn(tokens, model.hidden, requires_grad=True))
        with AllocationTrace() as trace, SavedBytes(stage) as counted:
            outputs.append(stage(tensors, inputs[-1]))
        saved.append(counted.bytes)
        peaks.append(trace.peak_bytes - trace.net_bytes)
    backward = []
    while outputs:
        output = outputs.pop()
        with AllocationTrace() as trace:
            torch.autograd.backward(output, torch.ones_like(output))
        backward.append(trace.peak_bytes)
        del output

    works = works_of(layouts, task)
    kept = [saved_bytes(model, model.layers, first=False, last=False, work=work) for work in works]
    handed_on = carried_kv_bytes(model, model.layers, tokens=works[0].carried_tokens)
    assert handed_on > 0
    # Half of it are gradients, which come with the backwards.
    assert sum(saved) == pytest.approx(sum(kept) + handed_on / 2, rel=0.02)
    everything = sum(saved)
    for work, forward_peak, backward_peak in zip(works, peaks, reversed(backward), strict=True):
        modelled = forward_workspace_bytes(model, last=False, work=work)
        assert forward_peak == pytest.approx(modelled, abs=0.03 * everything)
        modelled = backward_workspace_bytes(model, last=False, work=work)
        assert backward_peak == pytest.approx(modelled, abs=0.05 * everything)
