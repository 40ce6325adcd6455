"""SHiRA and diff pruning as the domain sees them."""

from __future__ import annotations

import pytest

from muxtune.model import PRESETS
from muxtune.peft import METHODS, attachments, check_peft
from muxtune.peft.diff import DiffSpec
from muxtune.peft.shira import ShiraSpec
from muxtune.support.errors import SpecError

LLAMA, GPT2 = PRESETS["llama-tiny"], PRESETS["gpt2-tiny"]


def shira(r: int, *targets: str) -> ShiraSpec:
    return ShiraSpec(method="shira", r=r, targets=targets or ("all-linear",))


def diff(density: float, *targets: str) -> DiffSpec:
    return DiffSpec(method="diff", density=density, targets=targets or ("all-linear",))


def test_entries_are_counted_of_the_whole_linear_and_shared_by_the_ranks():
    for tp in (1, 2):
        (each,) = attachments(shira(4, "k_proj"), LLAMA.shard(tp))
        assert each.parameters == 4 * (256 + 128) / tp
        (each,) = attachments(diff(0.01, "down_proj"), LLAMA.shard(tp))
        assert each.parameters == pytest.approx(0.01 * 688 * 256 / tp, abs=1)
    (each,) = attachments(diff(1e-9, "down_proj"), LLAMA)
    assert each.parameters == 1


@pytest.mark.parametrize(
    ("spec", "model", "message"),
    [
        (
            shira(86),
            LLAMA,
            r"peft\.r = 86: expected at most 85, with which the smallest of its linears in llama",
        ),
        (shira(1), GPT2, r"peft\.method = 'shira': expected another method, such as diff: .* has Conv1D"),
        (shira(1, "fc1"), LLAMA, r"peft\.targets = 'fc1': expected a linear of llama-tiny"),
        (diff(0.1, "fc1"), LLAMA, r"peft\.targets = 'fc1': expected a linear of llama-tiny"),
    ],
)
def test_what_cannot_run_is_refused(spec, model, message):
    with pytest.raises(SpecError, match=message):
        check_peft(spec, model, "peft")


@pytest.mark.parametrize("quick", [True, False])
def test_the_grid_has_the_shapes_of_the_operators(quick):
    grid = {dims[:2] for dims in METHODS.get("diff").kinds["sparse"].grid(GPT2, quick)}
    assert {each.adapter.dims[:2] for each in attachments(diff(0.1), GPT2)} == grid
