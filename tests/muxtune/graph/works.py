"""Micro-batches for graphs, and a device whose prices show what was asked."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from muxtune.costs import CostModel, MicrobatchWork
from muxtune.costs.ref import CostsRef
from muxtune.graph import StageGraph
from muxtune.graph.nodes import N
from muxtune.graph.operators import Operator, Phase
from muxtune.model import PRESETS, ModelSpec
from muxtune.peft import attachments
from muxtune.peft.lora import LoraSpec

LLAMA, GPT2, OPT = PRESETS["llama-tiny"], PRESETS["gpt2-tiny"], PRESETS["opt-tiny"]
MODELS = (LLAMA, GPT2, OPT)


def lora(*targets: str, r: int = 8) -> LoraSpec:
    return LoraSpec(method="lora", r=r, alpha=16, targets=targets)


def first_depth(model: ModelSpec, *pefts: LoraSpec) -> int:
    """Depth of the first thing that is trained in a layer."""
    return min(each.depth for peft in pefts for each in attachments(peft, model))


def work(*pefts: LoraSpec, **changes: object) -> MicrobatchWork:
    fields: dict[str, object] = {
        "tokens": 100 * len(pefts),
        "task_tokens": (100,) * len(pefts),
        "pefts": pefts,
        "attention": ((0.75, 2, 64), (1.5, 3, 16)),
        "targets": 10.5,
    }
    return MicrobatchWork(**(fields | changes))  # type: ignore[arg-type]


class Rates(CostModel):
    """Every operator takes a launch, and its dimensions in microseconds; collectives by bytes and ranks."""

    def __init__(self, model: ModelSpec) -> None:
        self.model = model

    @property
    def ref(self) -> CostsRef:
        return CostsRef(profile_id="rates", device="cpu", digest="")

    def latency_s(self, op: Operator, phase: Phase) -> float:
        return 1e-6 * (3 + sum(op.dims) + (phase == "bwd") * op.dims[0])

    def action_s(self, operators_s: float, phase: Phase) -> float:
        return operators_s + (1e-4 if phase == "fwd" else 0.0)

    def shard(self, tp: int) -> Rates:
        return Rates(self.model.shard(tp))

    def exploring(self) -> AbstractContextManager[None]:
        return nullcontext()


def behind(graph: StageGraph[N]) -> list[set[int]]:
    """Of each node of the expanded graph, all that it waits for at any distance."""
    found: list[set[int]] = []
    for node in graph.expand():
        assert all(dep < len(found) for dep in node.deps), "nodes wait for earlier ones"
        found.append(set(node.deps).union(*(found[dep] for dep in node.deps)))
    return found
