from __future__ import annotations

import pytest
import torch

from muxtune.graph.operators import FWD_ONLY, LINK_KINDS, OPERATOR_SUITES, Operator
from muxtune.model import PRESETS
from runtime.attention import BACKENDS
from runtime.operators import TorchOperators
from tests.helpers import TINY_PRESETS
from tests.kinds import MEASURED_KINDS

DIMS = {"in_features": 16, "out_features": 24, "r": 3, "layers": 2, "tensors": 4, "parameters": 100}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("model", TINY_PRESETS)
@pytest.mark.parametrize("kind", sorted(MEASURED_KINDS.keys() - LINK_KINDS))
def test_every_kind_runs_and_its_backward_repeats(kind, model, dtype):
    spec = PRESETS[model].model_copy(update={"dtype": dtype})
    op = Operator(kind, tuple(DIMS.get(dim, 5) for dim in MEASURED_KINDS[kind]))
    forward, backward = TorchOperators().build(op, spec, "cpu")
    forward()
    assert (backward is None) == (kind in FWD_ONLY)
    if backward is not None:
        backward()
        if kind != "stage":  # its graph is gone after one, as in a run
            backward()
        forward()
        backward()


def test_no_backward_if_nobody_needs_it():
    _, backward = TorchOperators().build(
        Operator("norm", (4,)), PRESETS["llama-tiny"], "cpu", needs_backward=False
    )
    assert backward is None


@pytest.mark.parametrize("kind", sorted(LINK_KINDS))
def test_what_needs_several_ranks_is_refused(kind):
    op = Operator(kind, (2,) * len(MEASURED_KINDS[kind]))
    with pytest.raises(ValueError, match=rf"{kind}\(.*\) cannot be built on one rank"):
        TorchOperators().build(op, PRESETS["llama-tiny"], "cpu")


def test_the_entry_point_finds_the_suite():
    assert isinstance(OPERATOR_SUITES.get("torch"), TorchOperators)


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    TorchOperators().build(Operator("stage", (1, 1, 2, 1, 4)), PRESETS["llama-tiny"], "cpu")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["grouped", "loop", "masked"])
def test_attention_and_stages_are_built_with_the_backend_of_the_suite(name, monkeypatch):
    used = []
    place = BACKENDS[name].place
    monkeypatch.setattr(BACKENDS[name], "place", lambda *arguments: used.append(name) or place(*arguments))
    suite, model = TorchOperators().with_attention(name), PRESETS["llama-tiny"]
    for build in (
        lambda: suite.build(Operator("attention", (3, 5)), model, "cpu"),
        lambda: suite.build(Operator("stage", (1, 1, 2, 2, 5)), model, "cpu"),
        lambda: tuple(suite.build_attention((4, 17, 1), model, "cpu").values()),
    ):
        used.clear()
        forward, backward = build()
        forward()
        backward()
        assert used
