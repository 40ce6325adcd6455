"""The grid holds what a plan asks for, and nothing that a backbone cannot run."""

import pytest

from muxtune.batches import row_slots
from muxtune.costs.compose import MicrobatchWork, stage_operators
from muxtune.costs.needs import PLAIN_KINDS
from muxtune.model import PRESETS
from muxtune.peft.lora import LoraSpec
from profiler.grid import MAX_TOKENS, operator_grid, powers, powers_and_between
from tests.kinds import KINDS_WITHOUT_BIASES, MEASURED_KINDS

MODELS = [
    PRESETS["llama-tiny"],
    PRESETS["gpt2-tiny"],
    PRESETS["llama-tiny"].model_copy(
        update={"hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 48, "max_positions": 24}
    ),
]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.name}-{model.hidden}")
def test_every_kind_is_measured_within_the_limits(model, quick):
    grid = operator_grid(model, quick=quick, kinds=set(MEASURED_KINDS))
    assert len(grid) == len(set(grid))
    absent = KINDS_WITHOUT_BIASES if model.family == "llama" else set()
    assert {op.kind for op in grid} == set(MEASURED_KINDS) - absent
    for op in grid:
        sizes = dict(zip(MEASURED_KINDS[op.kind], op.dims, strict=True))
        assert min(size for name, size in sizes.items() if (op.kind, name) != ("stage", "r")) >= 1
        assert sizes.get("tokens", 1) <= MAX_TOKENS
        assert sizes.get("length", 1) <= row_slots(model.max_positions)
        assert sizes.get("layers", 1) <= model.layers
        if op.kind == "lora":
            assert sizes["r"] <= min(sizes["in_features"], sizes["out_features"])
        if op.kind == "attention":
            assert sizes["sequences"] * sizes["length"] <= MAX_TOKENS
        if op.kind == "optimizer":
            assert sizes["parameters"] % sizes["tensors"] == 0


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.name}-{model.hidden}")
def test_every_linear_and_adapter_of_a_stage_is_in_it(model):
    lora = LoraSpec(method="lora", r=8, alpha=8, targets=("all-linear",))
    work = MicrobatchWork(tokens=64, task_tokens=(64,), pefts=(lora,), attention=((1.0, 4, 16),), targets=16)
    measured = {(op.kind, op.dims[:2]) for op in operator_grid(model, quick=True)}
    for op, _ in stage_operators(model, 2, first=True, last=True, work=work, phase="fwd"):
        if op.kind in {"linear", "lora"}:
            assert (op.kind, op.dims[:2]) in measured


@pytest.mark.parametrize("quick", [False, True])
def test_sums_of_a_tensor_parallel_stage_lie_inside_the_measured_ones(quick):
    model = PRESETS["llama-tiny"]
    lora = LoraSpec(method="lora", r=8, alpha=8, targets=("all-linear",))
    measured = [op.dims[0] for op in operator_grid(model, quick=quick) if op.kind == "all_reduce"]
    for tokens, targets in ((16, 16), (MAX_TOKENS, 1024)):
        calls = ((1.0, 1, tokens),)
        work = MicrobatchWork(
            tokens=tokens, task_tokens=(tokens,), pefts=(lora,), attention=calls, targets=targets
        )
        for phase in ("fwd", "bwd"):
            operators = stage_operators(model, 2, first=True, last=True, work=work, phase=phase, tp=2)
            sizes = [op.dims[0] for op, _ in operators if op.kind == "all_reduce"]
            assert sizes
            assert min(measured) <= min(sizes)
            assert max(sizes) <= max(measured)


def test_plain_lora_needs_no_kind_of_the_other_methods():
    kinds = {op.kind for op in operator_grid(PRESETS["llama-tiny"], quick=False)}
    assert kinds == PLAIN_KINDS
    assert "lora" in kinds
    assert not kinds & {"dropout", "ia3", "sparse", "lora_magnitude", "lora_dropped_dora"}


def test_quick_is_less_than_the_half():
    model = PRESETS["llama-tiny"]
    assert 2 * len(operator_grid(model, quick=True)) < 1.1 * len(operator_grid(model, quick=False))


def test_series():
    assert powers(16, 100, 2) == [16, 32, 64, 100]
    assert powers_and_between(16, 64) == [16, 24, 32, 48, 64]
