"""Errors: one line each, whole after pickling, with help for a mistyped name."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from muxtune.cluster import ClusterSpec
from muxtune.plan import Plan
from muxtune.schedule.actions import ScheduleError
from muxtune.support.errors import MuxTuneError, RunError, SpecError, UserError, spec_error_from, unknown_name
from muxtune.tasks import Workload


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = Field(gt=0)


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: Inner
    names: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _short(self):
        if len(self.names) > 2:
            raise ValueError("expected at most two names")
        return self


def test_spec_error_says_where_what_and_what_would_be_right():
    error = SpecError("tasks.a.steps", "many", "an integer above 0")
    assert str(error) == "tasks.a.steps = 'many': expected an integer above 0"
    assert isinstance(error, UserError)
    assert isinstance(error, ValueError)


def test_a_run_error_is_not_the_users_mistake():
    assert issubclass(RunError, MuxTuneError)
    assert not issubclass(RunError, UserError)


def test_a_huge_value_is_cut_in_the_message_but_kept_in_the_error():
    error = SpecError("tasks", list(range(10_000)), "fewer")
    assert len(str(error)) < 160
    assert error.args[1] == list(range(10_000))


def test_a_value_with_line_breaks_stays_on_one_line():
    assert "\n" not in str(SpecError("tasks", "a\nb", "one line"))


@pytest.mark.parametrize(
    "error",
    [
        SpecError("a.b", [1], "2"),
        UserError("x"),
        RunError("rank 1: y"),
        ScheduleError("schedule[0][1]", "why", "grid"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_errors_survive_pickling_between_workers(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.args == error.args


def test_a_mistyped_name_gets_the_nearest_known_one():
    assert str(unknown_name("policy", "slpeft", ["sl-peft", "nemo"])) == (
        "no policy named 'slpeft'; did you mean 'sl-peft'?"
    )


def test_a_name_that_is_near_to_nothing_gets_all_known_ones():
    assert (
        str(unknown_name("policy", "zzz", ["sl-peft", "nemo"]))
        == "no policy named 'zzz'; there are nemo, sl-peft"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"inner": {"size": 0}}, "f.yaml: inner.size = 0: expected greater than 0"),
        ({"inner": {"size": 1, "sise": 2}}, "f.yaml: inner.sise = 2: expected no such field"),
        ({}, "f.yaml: inner = None: expected a value; the field is required"),
        ({"inner": {"size": 1}, "names": ["a", "b", "c"]}, "expected at most two names"),
        ({"inner": {"size": 0}, "names": 3}, "f.yaml: inner.size = 0: expected greater than 0 (and 1 more)"),
        ({"inner": {"size": 1}, "names": ["a", 3]}, "f.yaml: names.1 = 3: expected a valid string"),
        (7, "f.yaml = 7: expected"),
    ],
)
def test_a_complaint_of_pydantic_becomes_one_line(content, message):
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(content)
    error = spec_error_from(caught.value, "f.yaml")
    assert message in str(error)
    assert "\n" not in str(error)
    assert "expected expected" not in str(error)


class Choice(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    base: str | dict[str, int] | None = None
    items: tuple[Inner, ...] = Field(default=(), min_length=1)
    list: tuple[str, ...] = ()
    name: str = Field(default="a", pattern="^[a-z]*$", max_length=3)
    rate: float = 1.0
    on: bool = True


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"base": 3}, "f: base = 3: expected a valid string, in quotes or a mapping"),
        ({"base": [1], "on": "maybe"}, "f: base = [1]: expected a valid string or a mapping (and 1 more)"),
        ({"items": [{"size": 0}]}, "f: items.0.size = 0: expected greater than 0"),
        (
            {"items": [{"size": 0}, {"size": "x"}, 3]},
            "f: items.0.size = 0: expected greater than 0 (and 2 more)",
        ),
        ({"items": []}, "f: items = []: expected at least 1, not 0"),
        ({"items": "many"}, "f: items = 'many': expected a valid list"),
        ({"items": [3]}, "f: items.0 = 3: expected a mapping with fields"),
        ({"list": {"a": 1}}, "f: list = {'a': 1}: expected a valid list"),
        ({"name": "A"}, "f: name = 'A': expected a string that matches ^[a-z]*$"),
        ({"name": "abcd"}, "f: name = 'abcd': expected at most 3 characters"),
        ({"rate": "fast"}, "f: rate = 'fast': expected a valid number"),
        ({"rate": float("inf")}, "f: rate = inf: expected a finite number"),
        ({"on": "maybe"}, "f: on = 'maybe': expected a valid boolean, true or false"),
        ({1: 2}, "f: 1 = 1: expected fields whose names are strings"),
        ([], "f = []: expected a mapping with fields"),
    ],
    ids=str,
)
def test_a_complaint_is_in_our_words_and_counts_mistakes(content, message):
    with pytest.raises(ValidationError) as caught:
        Choice.model_validate(content)
    assert str(spec_error_from(caught.value, "f")) == message


PYDANTIC = [
    "Input should",
    "valid tuple",
    "valid dictionary",
    "instance of",
    "unable to parse",
    "Value error",
]


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(VALUES)
def test_no_words_of_pydantic_are_shown(value):
    for schema in (Choice, Outer, Workload, ClusterSpec, Plan):
        for content in (value, dict.fromkeys(schema.model_fields, value)):
            try:
                schema.model_validate(content)
            except ValidationError as error:
                complaint = spec_error_from(error, "").args[2]
                assert not any(words in complaint for words in PYDANTIC)
                assert "another kind" not in complaint  # every kind of complaint has words of ours
