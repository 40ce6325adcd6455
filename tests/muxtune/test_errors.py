"""Errors: one line each, whole after pickling, with help for a mistyped name."""

import pickle

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from muxtune.errors import MuxTuneError, RunError, SpecError, UserError, spec_error_from, unknown_name
from muxtune.schedule import ScheduleError


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
