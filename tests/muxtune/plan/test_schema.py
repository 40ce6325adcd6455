"""The JSON Schema of plan.json describes every field, in the words of the attribute docstrings."""

from __future__ import annotations

import pytest

from muxtune.plan import Plan
from muxtune.plan.by_hand import HandDecisions

FORMATS = {"plan": Plan, "decisions by hand": HandDecisions}


def described(model):
    schema = model.model_json_schema()
    for name, part in ((model.__name__, schema), *schema["$defs"].items()):
        if "properties" in part:
            yield name, part.get("description")
            for key, field in part["properties"].items():
                yield f"{name}.{key}", field.get("description")


@pytest.mark.parametrize("name", FORMATS)
def test_every_property_and_every_model_has_a_description(name):
    found = dict(described(FORMATS[name]))
    assert len(found) > 25
    assert [key for key, words in found.items() if not words] == []


def test_descriptions_are_sentences_of_the_code():
    schema = Plan.model_json_schema()["$defs"]
    assert schema["Parallelism"]["properties"]["pp"]["description"] == "Pipeline stages."
    assert schema["Decisions"]["properties"]["htasks"]["description"].startswith("The fusion:")
