"""What is left of a job is what its lines do not have."""

import pytest

from muxtune.costs.needs import PLAIN_KINDS
from muxtune.costs.profile import Overlap
from muxtune.graph.attention_backends import AttentionContest, AttentionTime
from muxtune.graph.operators import COLLECTIVE_KINDS, FWD_ONLY, PHASES, Operator
from muxtune.model import PRESETS
from profiler.jobs import plan_job, remaining_job
from profiler.timing import Sample
from profiler.worker_protocol import Reading

MODEL = PRESETS["llama-tiny"]
SAMPLE = Sample(1e-3, 1e-3, 1e-3, 5)


def job(**options):
    return plan_job(MODEL, "cpu", 2, **{"kinds": PLAIN_KINDS, "link_ranks": 2, "quick": False} | options)


def said_by(entries, ranks):
    """Readings of some operators by all ranks that tell of them."""
    for kind, dims in entries:
        for phase in PHASES[:1] if kind in FWD_ONLY else PHASES:
            for _ in range(ranks):
                yield Reading(Operator(kind, dims), phase, SAMPLE)
        if kind == "p2p":
            yield Reading(Operator("message", dims), "fwd", SAMPLE)


def overlap(tokens):
    return Overlap(tokens=tokens, calls=1, compute_s=1.0, communication_s=1.0, both_s=1.0)


def test_wherever_it_was_stopped_the_rest_is_left_in_order():
    whole = job()
    for links, overlaps, operators in ((0, 0, 0), (7, 0, 0), (60, 4, 0), (len(whole.links), 6, 321)):
        lines = [
            *said_by(whole.links[:links], 1),
            *map(overlap, whole.overlaps[:overlaps]),
            *said_by(whole.operators[:operators], 2),
        ]
        left = remaining_job(whole, lines)
        assert left.links == whole.links[links:]
        assert left.overlaps == whole.overlaps[overlaps:]
        assert left.operators == whole.operators[operators:]


def test_an_operator_counts_when_all_ranks_and_phases_have_told():
    whole = job()
    first = whole.operators[0]
    lines = list(said_by([first], 2))
    assert remaining_job(whole, lines[:-1]).operators == whole.operators
    assert remaining_job(whole, lines).operators == whole.operators[1:]


def test_all_of_it_leaves_nothing():
    whole = job()
    lines = [*said_by(whole.links, 1), *map(overlap, whole.overlaps), *said_by(whole.operators, 2)]
    assert remaining_job(whole, lines).is_empty
    assert not whole.is_empty


def test_attention_competes_once():
    time = AttentionTime(backend="loop", fwd_s=(1.0,), bwd_s=(1.0,))
    contest = AttentionContest(streams=((8,),), times=(time,), chosen="loop")
    assert remaining_job(job(), []).attention is None
    assert remaining_job(job(), [contest]).attention == "loop"
    assert remaining_job(job(attention="grouped"), []).attention == "grouped"


def test_kinds_of_a_method_alone_need_no_links():
    added = job(kinds={"ia3"})
    assert added.kinds == {"ia3"}
    assert (added.links, added.overlaps, added.communicates) == ((), (), False)
    assert added.processes == 2


@pytest.mark.parametrize("quick", [False, True])
def test_links_are_measured_first_and_in_every_session_that_has_all(quick):
    kinds = {kind for kind, _ in job(quick=quick).links}
    assert kinds == {"p2p"} | COLLECTIVE_KINDS
