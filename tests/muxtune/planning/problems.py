"""Small planning problems with made-up but plausible costs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from muxtune.cluster import ClusterSpec, DeviceSpec, LinkSpec
from muxtune.costs import CostModel
from muxtune.costs.ref import CostsRef
from muxtune.graph.operators import Operator, Phase
from muxtune.model import PRESETS, ModelSpec
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.tasks import Workload, workload_from

TINY = PRESETS["llama-tiny"].model_copy(update={"layers": 4})


class FakeCosts(CostModel):
    """A device whose operators cost a launch and a rate, so that fusing pays for small micro-batches."""

    def __init__(self, launch_s: float = 20e-6, tokens_per_s: float = 2e6) -> None:
        self.launch_s = launch_s
        self.tokens_per_s = tokens_per_s

    @property
    def ref(self) -> CostsRef:
        return CostsRef(profile_id="fake", device="fake", digest="0")

    def latency_s(self, op: Operator, phase: Phase) -> float:
        amount = {"attention": op.dims[0] * op.dims[-1], "optimizer": 1, "p2p": op.dims[0] / 1024}
        return self.launch_s + amount.get(op.kind, op.dims[-1]) / self.tokens_per_s

    def shard(self, tp: int) -> FakeCosts:
        return self

    def exploring(self) -> AbstractContextManager[None]:
        return nullcontext()

    def action_s(self, operators_s: float, phase: Phase) -> float:
        return 100e-6 + operators_s


def make_workload(tasks: Sequence[dict[str, object]]) -> Workload:
    """Tasks given by what differs from a small default."""
    defaults: dict[str, object] = {
        "peft": {"method": "lora", "r": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
        "dataset": {"lengths": "sst2"},
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "max_length": 64,
        "learning_rate": 1e-3,
        "steps": 4,
    }
    named = [{"id": f"t{i}", **defaults, **task} for i, task in enumerate(tasks)]
    return workload_from({"tasks": named}, "workload", None)  # type: ignore[arg-type]


MIXED = (
    {"dataset": {"lengths": "sst2"}, "max_length": 64},
    {"dataset": {"lengths": "rte"}, "max_length": 256, "micro_batch_size": 2},
    {"dataset": {"lengths": "openbookqa"}, "max_length": 128},
    {"dataset": {"lengths": "sst2"}, "max_length": 64, "global_batch_size": 16, "micro_batch_size": 8},
    {"dataset": {"lengths": "openbookqa"}, "max_length": 128, "micro_batch_size": 8},
)


def make_problem(
    tasks: Sequence[dict[str, object]] = MIXED,
    *,
    ranks: int = 2,
    memory_bytes: int = 10**9,
    costs: FakeCosts | None = None,
    model: ModelSpec = TINY,
) -> PlanningProblem:
    """A problem on ``ranks`` equal devices."""
    cluster = ClusterSpec(
        name="fake",
        device=DeviceSpec(name="fake", kind="cpu", memory_bytes=memory_bytes),
        ranks=ranks,
        within_node=LinkSpec(name="fake", latency_s=1e-5, bandwidth_bytes_per_s=1e9),
    )
    return PlanningProblem(make_workload(tasks), model, cluster, costs or FakeCosts())
