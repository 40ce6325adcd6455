"""Operators of PEFT methods as the profiler builds them: forward and backward run, time after time."""

from __future__ import annotations

import pytest
import torch

from muxtune.model import PRESETS
from muxtune.operators import KINDS, Operator
from runtime.operators import TorchOperators

OPT = PRESETS["opt-tiny"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["ia3", "bias", "sparse"])
def test_every_shape_of_a_quick_grid_is_built(kind, dtype):
    model = OPT.model_copy(update={"dtype": dtype})
    shapes = list(KINDS[kind].grid(model, True))
    assert len(shapes) == len(set(shapes)) <= 24
    for dims in shapes:
        forward, backward = TorchOperators().build(Operator(kind, (*dims[:-1], 5)), model, "cpu")
        for _ in range(2):
            forward()
            backward()


def test_the_built_difference_adds_up_its_gradients():
    forward, backward = TorchOperators().build(Operator("bias", (4, 7)), OPT, "cpu")
    forward()
    once, twice = torch.as_tensor(backward()).clone(), torch.as_tensor(backward())
    torch.testing.assert_close(twice, 2 * once)
