"""Random planning problems for what is claimed of the fusion: devices, backbones, tasks and memory mixed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from muxtune.cluster import GPUS, ClusterSpec, DeviceSpec
from muxtune.costs import AnalyticCosts, RooflineCosts
from muxtune.costs.base import CostModel
from muxtune.costs.collectives import interconnect_of
from muxtune.costs.roofline import RooflineCoefficients
from muxtune.graph.operators import Phase
from muxtune.model import PRESETS, ModelSpec
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import HTaskChoice
from muxtune.planning.problem.meshes import choose_mesh
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.schedules import in_order
from muxtune.tasks import Workload, workload_from

DEVICES = ("a40", "h100", "cpu")

_LLAMA = PRESETS["llama2-7b"]
MODELS: dict[str, tuple[ModelSpec, ...]] = {
    "gpu": (
        _LLAMA,
        _LLAMA.model_copy(update={"name": "llama2-7b-12", "layers": 12}),
        _LLAMA.model_copy(
            update={
                "name": "llama-1b",
                "layers": 16,
                "hidden": 2048,
                "ffn": 5632,
                "heads": 32,
                "kv_heads": 8,
                "head_dim": 64,
            }
        ),
    ),
    "cpu": (PRESETS["llama-tiny"], PRESETS["opt-tiny"]),
}

_CPU = RooflineCoefficients(
    device="cpu",
    launch_s=8e-6,
    flops_per_s=9e10,
    bytes_per_s=1.2e10,
    overlap=1.5,
    link_latency_s=8e-5,
    link_bytes_per_s=2e9,
    error=float("nan"),
)
"""Coefficients of about one core; the shape of what a profile interpolates on."""

_CPU_ACTION_S = {"fwd": 4e-4, "bwd": 6e-4}
"""Python and autograd around the operators of an action."""

_REPLICATED_SHARE = 0.4
"""Share of instances with several replicas, most of them on several nodes."""
_UNIFORM_SHARE = 0.3
"""Share of workloads whose tasks all have the same micro-batch size."""
_ALL_LINEAR_SHARE = 0.3
"""Share of tasks with adapters at every linear."""


class CpuCosts(RooflineCosts):
    """A core as a profile sees it: operators by roofline, and a fixed cost per action."""

    def action_s(self, operators_s: float, phase: Phase) -> float:
        """Operators and what is around them."""
        return _CPU_ACTION_S[phase] + operators_s


def cpu_costs(model: ModelSpec) -> CpuCosts:
    """Costs of a core."""
    return CpuCosts(_CPU, model)


def gpu_costs(model: ModelSpec, cluster: ClusterSpec) -> AnalyticCosts:
    """Costs of a cluster's GPUs."""
    return AnalyticCosts(cluster.device.name, model, interconnect_of(cluster))


@dataclass(frozen=True, slots=True)
class Instance:
    """A problem, and how it was drawn."""

    seed: int
    device: str
    model: str
    pp: int
    dp: int
    nodes: int
    tasks: int
    memory: float
    """Share of the way from the bare backbone to what all tasks in one hTask need; above 1 all fits."""
    workload: Workload
    problem: PlanningProblem

    def __str__(self) -> str:
        memory = "loose" if self.memory > 1 else f"{self.memory:.2f}"
        where = f"{self.device}, {self.model}, pp {self.pp}, dp {self.dp} on {self.nodes} nodes"
        return f"seed {self.seed}: {where}, {self.tasks} tasks, memory {memory}"


def draw_instance(seed: int, *, most_tasks: int = 8, least_tasks: int = 2, methods: bool = False) -> Instance:
    """The instance of a seed.

    Args:
        seed: Any whole number.
        most_tasks: Tasks at most.
        least_tasks: Tasks at least.
        methods: Whether tasks have other PEFT methods than LoRA, too; all else is drawn as without.
    """
    rng = np.random.default_rng(seed)
    device = str(rng.choice(DEVICES))
    models = MODELS["cpu" if device == "cpu" else "gpu"]
    model = models[rng.integers(len(models))]
    pp = int(rng.integers(1, 5))
    tasks = int(rng.integers(least_tasks, most_tasks + 1))
    workload = _draw_tasks(rng, tasks)
    if methods:
        workload = _with_methods(np.random.default_rng([seed, 2]), workload)
    memory = float(rng.choice([2.0, rng.uniform(0.15, 1.0)]))
    dp, nodes = _draw_replicas(np.random.default_rng([seed, 1]), device, pp)
    cluster = _cluster(device, pp * dp, nodes, GPUS["h100"].memory_bytes * 16)
    problem = _problem(workload, model, cluster)
    if memory <= 1:
        limit = _limit_bytes(problem, memory, pp, dp)
        problem = _problem(workload, model, _cluster(device, pp * dp, nodes, limit))
    return Instance(seed, device, model.name, pp, dp, nodes, tasks, memory, workload, problem)


def _draw_replicas(rng: np.random.Generator, device: str, pp: int) -> tuple[int, int]:
    """Replicas and nodes; those of a stage may share a node, a bridge, or neither."""
    if rng.random() >= _REPLICATED_SHARE:
        return 1, 1
    dp = int(rng.choice([2, 3, 4]))
    ranks = pp * dp
    if device == "cpu":
        return dp, 1
    return dp, int(rng.choice([nodes for nodes in range(2, ranks + 1) if ranks % nodes == 0]))


def _draw_tasks(rng: np.random.Generator, tasks: int) -> Workload:
    """Tasks that differ in everything; in some workloads all have the same micro-batch size."""
    uniform = rng.random() < _UNIFORM_SHARE
    common = int(2 ** rng.integers(0, 4))
    content = []
    for number in range(tasks):
        micro = common if uniform else int(2 ** rng.integers(0, 5))
        count = int(rng.choice([1, 2, 3, 4, 6, 8]))
        content.append(
            {
                "id": f"t{number}",
                "peft": {
                    "method": "lora",
                    "r": int(rng.choice([2, 8, 16, 64])),
                    "alpha": 16,
                    "targets": ["all-linear"] if rng.random() < _ALL_LINEAR_SHARE else ["q_proj", "v_proj"],
                },
                "dataset": {"lengths": str(rng.choice(["sst2", "openbookqa", "rte"]))},
                "global_batch_size": micro * count,
                "micro_batch_size": micro,
                "max_length": int(rng.choice([32, 64, 128, 256])),
                "learning_rate": 1e-4,
                "steps": 3,
                "seed": number,
            }
        )
    return workload_from({"tasks": content}, "workload", None)  # type: ignore[arg-type]


_OTHERS: tuple[dict[str, object], ...] = (
    {"method": "ia3", "targets": ["all-linear"]},
    {"method": "bottleneck", "size": 64},
    {"method": "bottleneck", "size": 16, "placement": "parallel", "blocks": ["mlp"]},
    {"method": "prompt_tuning", "num_virtual_tokens": 20},
    {"method": "prefix_tuning", "num_virtual_tokens": 16},
)
"""Methods beside LoRA, which all families can have."""
_OTHER_SHARE = 0.6
"""Share of tasks that have one of them."""


def _with_methods(rng: np.random.Generator, workload: Workload) -> Workload:
    content = []
    for task in workload.tasks:
        fields = task.model_dump(mode="json")
        if rng.random() < _OTHER_SHARE:
            fields["peft"] = dict(_OTHERS[rng.integers(len(_OTHERS))])
        content.append(fields)
    return workload_from({"tasks": content}, "workload", None)  # type: ignore[arg-type]


def _cluster(device: str, ranks: int, nodes: int, memory_bytes: int) -> ClusterSpec:
    return ClusterSpec(
        name=device,
        device=DeviceSpec(name=device, kind="cpu" if device == "cpu" else "cuda", memory_bytes=memory_bytes),
        ranks=ranks,
        nodes=nodes,
        within_node={"a40": "nvlink-pair", "h100": "nvlink-all", "cpu": "loopback-gloo"}[device],
        between_nodes="infiniband" if nodes > 1 else None,
    )


def _problem(workload: Workload, model: ModelSpec, cluster: ClusterSpec) -> PlanningProblem:
    on_cpu = cluster.device.kind == "cpu"
    costs: CostModel = cpu_costs(model) if on_cpu else gpu_costs(model, cluster)
    return PlanningProblem(workload, model, cluster, costs)


def _limit_bytes(problem: PlanningProblem, share: float, pp: int, dp: int) -> int:
    """Bytes between the bare backbone and the peak of all tasks in one hTask, on the fullest stage."""
    ids = tuple(problem.data)
    whole = HTaskChoice(task_ids=ids, shape=problem.shape(ids, "pack", dp=dp))
    mesh = choose_mesh(problem, [whole], PlanOptions(pp=pp, dp=dp))
    memory = problem.memory(in_order([whole], mesh, "continuous"))
    fullest = max(memory, key=lambda stage: stage.total_bytes)
    bare = fullest.backbone_bytes + fullest.table_bytes
    return bare + round(share * (fullest.total_bytes - bare))
