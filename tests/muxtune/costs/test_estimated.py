"""Estimates: exact where the other backbone is the same, near where it is not, and marked as estimates."""

import pytest

from muxtune.costs import ProfiledCosts, save_profile
from muxtune.costs.compose import MicrobatchWork
from muxtune.costs.estimated import (
    EstimatedCosts,
    EstimateError,
    EstimateErrors,
    nearest_profile,
    usual_errors,
)
from muxtune.costs.needs import PLAIN_KINDS, needed_kinds
from muxtune.graph.operators import Operator
from muxtune.model import PRESETS
from muxtune.operators import KINDS
from muxtune.peft.lora import LoraSpec
from tests.muxtune.costs.actions import stage_seconds
from tests.muxtune.costs.synthetic import MODEL, analytic_law, make_profile, operators

WIDER = MODEL.model_copy(
    update={"name": "wider", "hidden": 384, "ffn": 1024, "heads": 6, "kv_heads": 6, "head_dim": 64}
)


def profile_of(model, factor=1.0):
    law = analytic_law(model)
    return make_profile(lambda op, phase: factor * law(op, phase), operators(model), model)


def estimated(source, model, origin="another backbone"):
    return EstimatedCosts(source, model, origin, "muxtune profile --model x")


def works(model):
    lora = LoraSpec(method="lora", r=8, alpha=8, targets=("all-linear",))
    for sequences, length in ((1, 32), (4, 64), (8, 128)):
        tokens = sequences * length
        yield MicrobatchWork(
            tokens=tokens,
            task_tokens=(tokens,),
            pefts=(lora,),
            attention=((1.0, sequences, length),),
            targets=tokens / 2,
        )


@pytest.mark.parametrize("origin", ["another backbone", "calibration"])
def test_of_the_backbone_that_was_measured_it_is_exact(origin):
    source = profile_of(MODEL, 1.5)
    own, guess = ProfiledCosts(source, MODEL), estimated(source, MODEL, origin)
    for work in works(MODEL):
        for phase in ("fwd", "bwd"):
            args = {"first": True, "last": True, "work": work, "phase": phase}
            assert stage_seconds(guess, MODEL, 4, **args) == stage_seconds(own, MODEL, 4, **args)


@pytest.mark.parametrize("model", [WIDER, PRESETS["gpt2-tiny"], PRESETS["opt-tiny"]], ids=lambda m: m.name)
def test_of_another_backbone_on_the_same_device_it_is_near(model):
    """Both follow one law of the device, with its coefficients: what is left is interpolation."""
    own, guess = ProfiledCosts(profile_of(model, 2.0), model), estimated(profile_of(MODEL, 2.0), model)
    for work in works(model):
        for phase in ("fwd", "bwd"):
            args = {"first": True, "last": True, "work": work, "phase": phase}
            assert stage_seconds(guess, model, 4, **args) == pytest.approx(
                stage_seconds(own, model, 4, **args), rel=0.02
            )


def test_it_says_what_it_is_and_how_far_off_it_usually_is(recwarn):
    guess = estimated(profile_of(MODEL), WIDER)
    ref = guess.ref
    assert ref.kind == "estimated"
    assert ref.profile_id.startswith("estimated-wider-")
    with guess.noting() as notes:
        guess.latency_s(Operator("linear", (384, 384, 100_000)), "fwd")
        guess.latency_s(Operator("all_reduce", (4096, 2)), "fwd")
        guess.latency_s(Operator("ia3", (384, 384, 16)), "fwd")
    assert notes[0].startswith("estimated from what was measured of llama-tiny on this machine; ")
    assert notes[0].endswith("`muxtune profile --model x` measures")
    assert not recwarn.list  # shapes outside of a profile are no news in an estimate
    assert "a calibration of a few seconds" in estimated(profile_of(MODEL), MODEL, "calibration").sentence


def test_its_identity_follows_what_was_measured_and_the_shapes():
    ids = {estimated(profile_of(MODEL, f), m).ref.digest for f in (1.0, 2.0) for m in (MODEL, WIDER)}
    assert len(ids) == 4
    guess = estimated(profile_of(MODEL), WIDER)
    part = guess.of_kinds(needed_kinds([], WIDER))
    assert part.ref.profile_id == guess.ref.profile_id
    assert part.ref.digest != guess.ref.digest  # that has dropout
    assert part.shard(2).latency_s(Operator("linear", (384, 192, 64)), "fwd") > 0
    assert part.profile.kinds <= PLAIN_KINDS


def test_collectives_of_any_group_and_unmeasured_kinds_have_a_price():
    guess = estimated(profile_of(MODEL), WIDER)
    assert guess.largest_group is None
    assert guess.latency_s(Operator("all_reduce", (4096, 4)), "fwd") > guess.latency_s(
        Operator("all_reduce", (4096, 2)), "fwd"
    )
    for kind in sorted(set(KINDS) - {"stage"}):
        grid = KINDS[kind].grid
        for dims in [] if grid is None else list(grid(WIDER, True))[:2]:
            assert guess.latency_s(Operator(kind, dims), "fwd") > 0


def test_the_profile_of_the_most_similar_backbone_is_taken(tmp_path):
    assert nearest_profile(tmp_path, MODEL, 2) is None
    assert nearest_profile(tmp_path / "nothing", MODEL, 2) is None
    (tmp_path / "broken.parquet").write_text("none")
    far = MODEL.model_copy(update={"name": "far", "ffn": 5 * 688})
    save_profile(profile_of(far), tmp_path / "far.parquet")
    double = MODEL.model_copy(update={"name": "double", "dtype": "float64"})
    save_profile(profile_of(double), tmp_path / "double.parquet")
    assert nearest_profile(tmp_path, MODEL, 2) is None
    for model in (WIDER, PRESETS["gpt2-tiny"], PRESETS["opt-tiny"]):
        save_profile(profile_of(model), tmp_path / f"{model.name}.parquet")
    assert nearest_profile(tmp_path, PRESETS["gpt2-tiny"], 2) == tmp_path / "gpt2-tiny.parquet"
    wider = WIDER.model_copy(update={"hidden": 320, "name": "320"})
    assert nearest_profile(tmp_path, wider, 2) == tmp_path / "wider.parquet"


def test_errors_that_ship_were_measured_on_several_backbones():
    errors = usual_errors()
    for error in errors.errors.values():
        assert len(errors.backbones) >= 4
        assert 0 < error.mean <= error.largest
        assert error.cases >= 16


def test_the_usual_error_is_said_where_it_was_measured(monkeypatch):
    error = EstimateError(mean=0.123, largest=0.345, cases=20)
    found = EstimateErrors(
        machine="m", date="d", command="c", backbones=("b",), errors={"another backbone": error}
    )
    monkeypatch.setattr("muxtune.costs.estimated.usual_errors", lambda: found)
    known, unknown = (
        estimated(profile_of(MODEL), WIDER, origin) for origin in ("another backbone", "calibration")
    )
    assert "were 12% off on average and 34% at most, relative to a profile's" in known.sentence
    assert known.ref.usual_error == 0.123
    assert known.ref.mark == "by estimated costs, which are usually off by 12%"
    assert "how far off such estimates are was not measured" in unknown.sentence
    assert unknown.ref.usual_error is None
    assert unknown.ref.mark == "by estimated costs"
    assert ProfiledCosts(profile_of(MODEL), MODEL).ref.mark is None
