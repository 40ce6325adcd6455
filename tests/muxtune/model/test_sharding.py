"""Numbers of ranks that a backbone can be dealt out to."""

from __future__ import annotations

import pytest

from muxtune.model import PRESETS
from muxtune.model.sharding import check_sharding, sharding_obstacle
from muxtune.support.errors import SpecError

LLAMA = PRESETS["llama-tiny"]  # 8 heads, 4 for keys and values; MLP 688 wide, 264 words


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_divisors_of_the_heads_are_accepted_and_shared_heads_repeated(tp):
    assert sharding_obstacle(LLAMA, tp) is None
    check_sharding(LLAMA, tp)


@pytest.mark.parametrize(
    ("changes", "tp", "expected"),
    [
        ({}, 0, "a divisor of 8, the heads of llama-tiny"),
        ({}, 3, "a divisor of 8, the heads of llama-tiny"),
        (
            {"heads": 12, "kv_heads": 3},
            2,
            "a divisor or a multiple of 3, the key and value heads of llama-tiny",
        ),
        ({"vocab": 6}, 8, "at most 6, the smaller of MLP width and vocabulary"),
        ({"ffn": 7}, 8, "at most 7, the smaller of MLP width and vocabulary"),
    ],
)
def test_others_are_refused_with_what_would_divide(changes, tp, expected):
    spec = LLAMA.model_copy(update=changes)
    assert sharding_obstacle(spec, tp) == expected
    with pytest.raises(SpecError) as refused:
        check_sharding(spec, tp)
    assert refused.value.args == ("parallelism.tp", tp, expected)
