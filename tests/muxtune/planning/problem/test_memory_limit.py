"""What does not fit the memory is refused with the number that is too large and the nearest that fits."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.problem.assemble import structure_schedule
from muxtune.planning.problem.memory_limit import fits, fitting
from muxtune.policies import POLICIES, plan_problem
from muxtune.support.errors import NotEnoughMemoryError, SpecError
from muxtune.support.tables import show_bytes_up
from tests.muxtune.planning.problems import MIXED, make_problem


def refused(policy: str, memory_bytes: int, options: PlanOptions | None = None) -> NotEnoughMemoryError:
    with pytest.raises(NotEnoughMemoryError) as caught:
        plan_problem(make_problem(memory_bytes=memory_bytes), policy=policy, options=options or PlanOptions())
    assert "\n" not in str(caught.value)
    assert f"expected at least {show_bytes_up(caught.value.needed_bytes)}: stage" in str(caught.value)
    return caught.value


def refusal(policy: str, memory_bytes: int, options: PlanOptions | None = None) -> str:
    return str(refused(policy, memory_bytes, options))


def needed_bytes(
    policy: str, *, memory_bytes: int = 10**9, tasks=MIXED, options: PlanOptions | None = None
) -> int:
    problem = make_problem(tasks, memory_bytes=memory_bytes)
    plan = plan_problem(problem, policy=policy, options=options or PlanOptions())[0]
    return max(plan.predicted.peak_memory_bytes)


@pytest.mark.parametrize("policy", ["nemo", "sl-peft"])
@pytest.mark.parametrize("options", [PlanOptions(pp=1), PlanOptions(pp=2)], ids=["one", "two"])
def test_the_bytes_in_the_message_are_just_enough(policy, options):
    needed = refused(policy, 20_000_000, options).needed_bytes
    assert needed == needed_bytes(policy, options=options)
    assert needed_bytes(policy, memory_bytes=needed, options=options) == needed
    assert refused(policy, needed - 1, options).needed_bytes == needed


@pytest.mark.parametrize("policy", ["nemo", "sl-peft", "temporal-only"])
def test_the_bytes_in_the_message_are_those_of_the_mesh_that_needs_least(policy):
    needed = refused(policy, 20_000_000).needed_bytes
    assert needed_bytes(policy, memory_bytes=needed) == needed
    assert refused(policy, needed - 1).needed_bytes == needed


def test_instances_are_told_to_share_one_backbone():
    options = PlanOptions(pp=2)
    message = refusal("nemo", needed_bytes("nemo", options=options) - 1, options)
    assert "the nearest that fits needs" in message
    assert message.endswith("one backbone for all (policy temporal-only)")


def test_a_padded_batch_is_told_to_pack():
    options = PlanOptions(pp=2)
    needed = needed_bytes("sl-peft", options=options)
    assert refusal("sl-peft", needed - 1, options).endswith("packed sequences (--alignment pack)")


def refusals(policy: str) -> Iterator[tuple[int, NotEnoughMemoryError]]:
    """Memory, and what is said about it: always a byte less than the nearest that fits."""
    limit = refused(policy, 10**6).needed_bytes - 1
    while "nearest that fits" in str(error := refused(policy, limit)):
        promised = f"the nearest that fits needs {show_bytes_up(error.nearest_bytes)}: "
        assert promised in str(error)
        yield limit, error
        limit = error.nearest_bytes - 1


def test_the_cut_micro_batches_that_are_proposed_do_fit():
    limit, error = next(each for each in refusals("temporal-only") if "--carry" in str(each[1]))
    chunk, carry = map(int, re.search(r"--chunk-tokens (\d+) --carry (\d)\)$", str(error)).groups())
    assert error.nearest_bytes <= limit
    # Layers and order of the hTasks are chosen anew for cut micro-batches, which moves some bytes.
    near = make_problem(memory_bytes=round(1.1 * limit))
    cut = PlanOptions(carry=carry, chunk_tokens=chunk)
    assert set(plan_problem(near, policy="temporal-only", options=cut)[0].carries) == {carry}
    with pytest.raises(SpecError):
        plan_problem(make_problem(memory_bytes=limit), policy="temporal-only", options=PlanOptions(carry=1))


def test_the_smaller_micro_batches_that_are_proposed_do_fit():
    limit, error = next(each for each in refusals("temporal-only") if "micro_batch_size" in str(each[1]))
    cap = int(str(error).rsplit(" ", 1)[1])
    assert error.nearest_bytes <= limit
    smaller = [
        task | {"micro_batch_size": min(cap, int(str(task.get("micro_batch_size", 4))))} for task in MIXED
    ]
    assert needed_bytes("temporal-only", memory_bytes=limit, tasks=smaller) <= limit


def test_if_nothing_near_fits_the_least_is_named():
    error = refused("spatial-only", 1_000_000)
    changes = r"every task in an hTask of its own \(policy temporal-only\), micro_batch_size of at most 1"
    least = re.escape(show_bytes_up(error.nearest_bytes))
    assert re.search(rf"nothing near fits; least is {least}: {changes}$", str(error))
    assert 1_000_000 < error.nearest_bytes < error.needed_bytes


def test_structures_that_fit_only_by_their_schedule_are_kept():
    problem = make_problem()
    structures = POLICIES.get("temporal-only").propose(problem, PlanOptions())
    exact = {s: max(m.total_bytes for m in problem.memory(s, structure_schedule(s))) for s in structures}
    bound = {s: max(m.total_bytes for m in problem.memory(s)) for s in structures}
    assert all(exact[s] < bound[s] for s in structures)
    limit = sorted(exact.values())[len(exact) // 2]
    tight = make_problem(memory_bytes=limit)
    assert any(bound[s] > limit >= exact[s] for s in structures)
    kept = [s for s in structures if exact[s] <= limit]
    assert fitting(tight, structures) == kept == [s for s in structures if fits(tight, s)]
