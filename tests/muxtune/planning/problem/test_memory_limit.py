"""What does not fit the memory is refused with the number that is too large and the nearest that fits."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.problem.assemble import structure_schedule
from muxtune.planning.problem.memory_limit import fits, fitting
from muxtune.policies import POLICIES, plan_problem
from muxtune.support.errors import SpecError
from tests.muxtune.planning.problems import MIXED, make_problem


def refusal(policy: str, memory_bytes: int, options: PlanOptions | None = None) -> str:
    with pytest.raises(SpecError) as caught:
        plan_problem(make_problem(memory_bytes=memory_bytes), policy=policy, options=options or PlanOptions())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def needed_bytes(
    policy: str, *, memory_bytes: int = 10**9, tasks=MIXED, options: PlanOptions | None = None
) -> int:
    problem = make_problem(tasks, memory_bytes=memory_bytes)
    plan = plan_problem(problem, policy=policy, options=options or PlanOptions())[0]
    return max(plan.predicted.peak_memory_bytes)


@pytest.mark.parametrize("policy", ["nemo", "sl-peft"])
@pytest.mark.parametrize("options", [PlanOptions(pp=1), PlanOptions(pp=2)], ids=["one", "two"])
def test_the_bytes_in_the_message_are_just_enough(policy, options):
    needed = int(re.search(r"expected at least (\d+)", refusal(policy, 20_000_000, options))[1])
    assert needed == needed_bytes(policy, options=options)
    assert needed_bytes(policy, memory_bytes=needed, options=options) == needed
    assert f"expected at least {needed}: stage" in refusal(policy, needed - 1, options)


@pytest.mark.parametrize("policy", ["nemo", "sl-peft", "temporal-only"])
def test_the_bytes_in_the_message_are_those_of_the_mesh_that_needs_least(policy):
    needed = int(re.search(r"expected at least (\d+)", refusal(policy, 20_000_000))[1])
    assert needed_bytes(policy, memory_bytes=needed) == needed
    assert f"expected at least {needed}: stage" in refusal(policy, needed - 1)


def test_instances_are_told_to_share_one_backbone():
    options = PlanOptions(pp=2)
    message = refusal("nemo", needed_bytes("nemo", options=options) - 1, options)
    assert "the nearest that fits needs" in message
    assert message.endswith("one backbone for all (policy temporal-only)")


def test_a_padded_batch_is_told_to_pack():
    options = PlanOptions(pp=2)
    needed = needed_bytes("sl-peft", options=options)
    assert refusal("sl-peft", needed - 1, options).endswith("packed sequences (--alignment pack)")


def promised_bytes(message: str) -> int:
    return int(re.search(r"nearest that fits needs (\d+)", message)[1])


def refusals(policy: str) -> Iterator[tuple[int, str]]:
    """Memory, and what is said about it: always a byte less than the nearest that fits."""
    limit = int(re.search(r"expected at least (\d+)", refusal(policy, 10**6))[1]) - 1
    while "nearest that fits" in (message := refusal(policy, limit)):
        yield limit, message
        limit = promised_bytes(message) - 1


def test_the_cut_micro_batches_that_are_proposed_do_fit():
    limit, message = next(each for each in refusals("temporal-only") if "--carry" in each[1])
    chunk, carry = map(int, re.search(r"--chunk-tokens (\d+) --carry (\d)\)$", message).groups())
    assert promised_bytes(message) <= limit
    # Layers and order of the hTasks are chosen anew for cut micro-batches, which moves some bytes.
    near = make_problem(memory_bytes=round(1.1 * limit))
    cut = PlanOptions(carry=carry, chunk_tokens=chunk)
    assert set(plan_problem(near, policy="temporal-only", options=cut)[0].carries) == {carry}
    with pytest.raises(SpecError):
        plan_problem(make_problem(memory_bytes=limit), policy="temporal-only", options=PlanOptions(carry=1))


def test_the_smaller_micro_batches_that_are_proposed_do_fit():
    limit, message = next(each for each in refusals("temporal-only") if "micro_batch_size" in each[1])
    cap = int(message.rsplit(" ", 1)[1])
    assert promised_bytes(message) <= limit
    smaller = [
        task | {"micro_batch_size": min(cap, int(str(task.get("micro_batch_size", 4))))} for task in MIXED
    ]
    assert needed_bytes("temporal-only", memory_bytes=limit, tasks=smaller) <= limit


def test_if_nothing_near_fits_the_least_is_named():
    message = refusal("muxtune", 1_000_000)
    # Two of the tasks need less memory fused, so the change begins with taking them apart.
    changes = r"every task in an hTask of its own \(policy temporal-only\), micro_batch_size of at most 1"
    least = int(re.search(rf"nothing near fits; least is (\d+): {changes}$", message)[1])
    assert 1_000_000 < least < int(re.search(r"expected at least (\d+)", message)[1])


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
