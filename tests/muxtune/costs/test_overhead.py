"""Overhead of an action, recovered from stages that were made with a known one."""

from dataclasses import replace

import pytest

from muxtune.costs import ActionOverhead, ProfiledCosts, StageSum
from muxtune.costs.overhead import CLASSES, fit_overhead, sum_stages
from muxtune.graph.operators import Operator
from tests.muxtune.costs.synthetic import MODEL, analytic_law, make_profile, operators, stage_s

STAGES = [
    Operator("stage", dims)
    for dims in (
        *((1, 1, 8, 2, 32), (1, 4, 8, 2, 64), (1, 8, 8, 1, 32), (1, 1, 8, 16, 128)),
        *((3, 1, 8, 1, 64), (3, 4, 16, 4, 64), (3, 2, 64, 2, 128), (3, 8, 4, 1, 48)),
        *((1, 1, 0, 2, 64), (3, 1, 0, 2, 512), (3, 4, 0, 4, 32)),
    )
]
TRUE = ActionOverhead(fixed_s=3e-4, per_operator_s=5e-6, factors=dict.fromkeys(CLASSES, 1.1))


def made_with(overhead, sums):
    return [replace(stage, measured_s=stage_s(overhead, stage)) for stage in sums]


@pytest.fixture(scope="module")
def forward_sums():
    plain = ProfiledCosts(make_profile(analytic_law(), operators()), MODEL)
    skeleton = make_profile(lambda op, phase: 1.0, STAGES)
    return [stage for stage in sum_stages(skeleton, plain) if stage.phase == "fwd"]


def test_all_three_parts_are_recovered_despite_an_outlier(forward_sums):
    stages = made_with(TRUE, forward_sums)
    stages[2] = replace(stages[2], measured_s=3 * stages[2].measured_s)
    fitted = fit_overhead(stages)
    assert fitted.factors == pytest.approx(TRUE.factors, rel=0.03)
    for i, stage in enumerate(made_with(TRUE, forward_sums)):
        if i != 2:
            assert stage_s(fitted, stage) == pytest.approx(stage.measured_s, rel=0.02)


@pytest.mark.parametrize(("true_factor", "kept"), [(0.2, 0.5), (5.0, 2.0)])
def test_a_factor_that_would_hide_a_wrong_operator_is_not_believed(forward_sums, true_factor, kept):
    stages = made_with(ActionOverhead(factors=dict.fromkeys(CLASSES, true_factor)), forward_sums)
    assert fit_overhead(stages).factors == pytest.approx(dict.fromkeys(CLASSES, kept), rel=0.02)


def test_a_class_that_costs_more_between_others_is_told_apart(forward_sums):
    factors = dict.fromkeys(CLASSES, 1.0) | {"adapter": 1.4}
    fitted = fit_overhead(made_with(ActionOverhead(factors=factors), forward_sums))
    assert fitted.factors["adapter"] == pytest.approx(1.4, abs=0.1)
    assert fitted.factors["linear"] == pytest.approx(1.0, abs=0.1)


def test_without_adapters_a_stage_has_none_of_their_time(forward_sums):
    for stage in forward_sums:
        assert (stage.classes_s["adapter"] == 0.0) == (stage.op.dims[2] == 0)
        assert stage.operators_s == pytest.approx(sum(stage.classes_s.values()))


def test_overhead_is_never_negative():
    stages = [
        StageSum(STAGES[i], "fwd", 0.9 * s, dict.fromkeys(CLASSES, s / len(CLASSES)), 10.0 * s)
        for i, s in enumerate((1e-3, 1e-2, 1e-1))
    ]
    fitted = fit_overhead(stages)
    assert fitted.fixed_s >= 0.0
    assert fitted.per_operator_s >= 0.0


def test_a_profile_without_stages_has_no_overhead():
    costs = ProfiledCosts(make_profile(analytic_law(), operators()), MODEL)
    assert costs.action_s(0.5, "fwd") == 0.5
    assert costs.overhead("bwd") == ActionOverhead()


def test_actions_of_a_profile_cost_what_its_stages_measured(forward_sums):
    measured = {stage.op: stage.measured_s for stage in made_with(TRUE, forward_sums)}
    law = analytic_law()

    def with_overhead(op, phase):
        return measured[op] if op.kind == "stage" else law(op, phase)

    costs = ProfiledCosts(make_profile(with_overhead, [*operators(), *STAGES]), MODEL)
    assert len(costs.stages) == 2 * len(STAGES)
    for stage in sum_stages(costs.profile, costs):
        if stage.phase == "fwd":
            # The operators' own latencies now include what each costs between others.
            assert costs.action_s(stage.operators_s, "fwd") == pytest.approx(stage.measured_s, rel=0.01)
