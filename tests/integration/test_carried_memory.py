"""Predicted memory of stages whose micro-batches carry keys and values on, against what real ranks count."""

from __future__ import annotations

import pytest

from benchmarks.memory import AnyCosts, MemoryCase, case_workload, count_case
from muxtune.batches import measure_shape
from muxtune.cluster import load_cluster
from muxtune.model import load_model_spec
from muxtune.plan import Plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import HTaskChoice, Mesh, PlanStructure
from muxtune.planning.exact.bytes import plan_memory
from muxtune.planning.problem.assemble import assemble_plan
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.schedule import Template

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.usefixtures("quick_ranks")]

STEPS = 2


def carrying_plan(model: str, *, carry: int, chunk_tokens: int, pp: int, template: Template) -> Plan:
    """All tasks in one hTask."""
    workload = case_workload(MemoryCase(model, "muxtune", PlanOptions(pp=pp), tasks=4), steps=STEPS)
    problem = PlanningProblem(
        workload, load_model_spec(model, "float32"), load_cluster(f"cpu-{pp}"), AnyCosts()
    )
    members = list(problem.data.values())
    shape = measure_shape(members, "chunk", chunk_tokens=chunk_tokens, carry=carry)
    structure = PlanStructure(
        htasks=(HTaskChoice(task_ids=tuple(problem.data), shape=shape),),
        buckets=((0,),),
        template=template,
        mesh=Mesh((problem.model.layers // pp,) * pp),
    )
    return assemble_plan(problem, structure, "made-by-hand")


@pytest.mark.parametrize(
    ("model", "carry", "chunk_tokens", "pp", "template"),
    [("llama-tiny", 2, 64, 2, "continuous"), ("gpt2-tiny", 4, 32, 1, "flush")],
)
def test_the_peak_of_every_stage_is_predicted_within_3_percent(model, carry, chunk_tokens, pp, template):
    plan = carrying_plan(model, carry=carry, chunk_tokens=chunk_tokens, pp=pp, template=template)
    memory = plan_memory(plan)
    assert [each.total_bytes for each in memory] == list(plan.predicted.peak_memory_bytes)
    assert all(each.chunk_kv_bytes > 0 for each in memory)
    counted = [each.peak_bytes for each in count_case(plan, steps=STEPS)]
    assert counted == pytest.approx(plan.predicted.peak_memory_bytes, rel=0.03)
