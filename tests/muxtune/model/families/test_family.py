"""What families of backbones have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from muxtune.model import FAMILIES
from muxtune.model.families.family import head_dim, says_nothing
from muxtune.support.errors import SpecError

WHERE = Path("config.json")


def test_heads_share_the_hidden_size():
    assert head_dim({"width": 96, "heads": 6}, "width", "heads", WHERE) == 16


@pytest.mark.parametrize("heads", [0, -1, 5])
def test_heads_that_do_not_divide_it_are_refused(heads):
    with pytest.raises(SpecError, match=rf"config\.json: heads = {heads}: expected a divisor of width, 96"):
        head_dim({"width": 96, "heads": heads}, "width", "heads", WHERE)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_a_key_with_such_a_value_might_as_well_not_be_there(value):
    assert says_nothing(value)


@pytest.mark.parametrize("value", [0, 0.0, True, "gelu", [0], {"a": None}])
def test_any_other_value_says_something(value):
    assert not says_nothing(value)


def test_names_of_a_model_with_a_head_have_its_prefix():
    assert {name: family.prefix for name, family in FAMILIES.items()} == {
        "llama": "model",
        "gpt2": "transformer",
        "opt": "model",
    }
