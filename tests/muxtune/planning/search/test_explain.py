"""Why a plan won."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from muxtune.plan import Orchestration
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.problem.assemble import structure_iteration_s
from muxtune.planning.search import explain
from muxtune.planning.search.explain import explain_search, iteration_parts
from muxtune.planning.search.search import search_structures
from tests.muxtune.planning.estimate.test_group_seconds import gpu_problem


@pytest.fixture(scope="module")
def searched():
    problem = gpu_problem(12, cluster="testbed-a")
    return problem, search_structures(problem)


def test_parts_of_an_iteration_are_the_iteration(searched):
    problem, record = searched
    for structure in record.structures:
        parts = iteration_parts(problem, structure)
        assert parts.iteration_s == pytest.approx(structure_iteration_s(problem, structure), rel=1e-9)
        assert min(parts.working_s, parts.padding_s, parts.waiting_s) >= 0


def test_tensor_parallel_ranks_communicate_and_one_alone_does_not():
    problem = gpu_problem(4, cluster="testbed-a")
    alone = search_structures(problem, PlanOptions(tp=1, pp=4, dp=1)).structures[0]
    assert iteration_parts(problem, alone).communication_s == pytest.approx(0.0, abs=1e-12)
    for options in (PlanOptions(tp=2, pp=2, dp=1), PlanOptions(tp=1, pp=2, dp=2)):
        parts = iteration_parts(problem, search_structures(problem, options).structures[0])
        assert 0 < parts.communication_s < parts.iteration_s


def test_overlap_hides_communication():
    problem = gpu_problem(6, cluster="testbed-c")
    fixed = PlanOptions(tp=4, pp=2, dp=1)
    overlapped = search_structures(problem, fixed).structures[0]
    assert overlapped.orchestration.mode != "sequential"
    parts = iteration_parts(problem, overlapped)
    serial = iteration_parts(problem, replace(overlapped, orchestration=Orchestration(mode="sequential")))
    assert parts.iteration_s == pytest.approx(structure_iteration_s(problem, overlapped), rel=1e-9)
    assert 0 <= parts.communication_s < serial.communication_s
    assert parts.working_s == pytest.approx(serial.working_s)
    modes = {
        row.choice
        for row in explain_search(problem, search_structures(problem, fixed)).runners_up
        if row.differs_in == "orchestration"
    }
    assert "sequential" in modes


def test_losses_add_up_to_what_a_runner_up_is_slower(searched):
    problem, record = searched
    explanation = explain_search(problem, record)
    assert explanation.iteration_s == pytest.approx(record.outcomes[0].value)
    for row in explanation.runners_up:
        lost_s = row.utilisation_s + row.padding_s + row.communication_s + row.bubble_s
        assert explanation.iteration_s + lost_s == pytest.approx(row.iteration_s, rel=1e-9)
        assert row.slower == pytest.approx(row.iteration_s / explanation.iteration_s - 1)
        if not row.missing_bytes:
            assert row.iteration_s >= explanation.iteration_s * (1 - 1e-9)
            assert row.lost_on != "memory"


def test_every_decision_has_a_runner_up(searched):
    problem, record = searched
    explanation = explain_search(problem, record)
    kinds = {row.differs_in for row in explanation.runners_up}
    assert {"hTasks", "buckets"} <= kinds
    assert "mesh" in kinds or explanation.not_played
    meshes = {str(structure.mesh) for _, structure in record.tried} | explanation.not_played.keys()
    assert meshes == {str(proposal.mesh) for proposal in record.proposals}
    assert all(guess_s > 0 for guess_s in explanation.not_played.values())


def test_an_explanation_plays_nothing(searched):
    _, record = searched
    tried = {structure for _, structure in record.tried}
    assert record.structures[0] in tried
    rows = list(explain._others(record, record.structures[0]))
    assert rows
    assert {structure for _, _, structure in rows} <= tried


def test_an_explanation_is_json(searched):
    problem, record = searched
    content = explain_search(problem, record).as_dict()
    assert json.loads(json.dumps(content)) == json.loads(json.dumps(content))
    assert {"winner", "parts", "runners_up"} <= set(content)
    assert all("lost_on" in row for row in content["runners_up"])
