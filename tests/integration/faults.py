"""Steps of one tenant that go wrong on one rank; everything around them is the product's own."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from muxtune.schedule import Template
from tests.integration.pairwise import sampled_product
from tests.sampling import in_full

STEPS, BAD_STEP = 9, 6


@dataclass(frozen=True)
class Case:
    template: Template
    clips: bool
    rank: int
    """That the fault is on."""
    pp: int = 1
    tp: int = 1
    dp: int = 1
    fault: Literal["inf", "nan", "loss", "huge", "data", "vocabulary", "adapter", "memory"] = "inf"

    def __str__(self) -> str:
        mesh = f"tp{self.tp}-pp{self.pp}-dp{self.dp}"
        return f"{self.template}-{mesh}-{'clipped' if self.clips else 'plain'}-{self.fault}-rank{self.rank}"


CASES = [
    *(
        Case(template, clips, rank, pp=2)
        for template, clips, rank in sampled_product(("flush", "continuous"), (False, True), (0, 1))
    ),
    Case("continuous", clips=False, rank=1, pp=3),
    Case("continuous", clips=False, rank=1, tp=2),
    Case("flush", clips=True, rank=0, dp=2),
    Case("continuous", clips=False, rank=2, pp=2, tp=2),
    Case("continuous", clips=False, rank=1, pp=2, dp=2),
    Case("continuous", clips=True, rank=0, pp=2, fault="nan"),
    Case("continuous", clips=False, rank=0, pp=2, fault="huge"),
    Case("flush", clips=True, rank=1, pp=2, fault="loss"),
    Case("continuous", clips=False, rank=0, fault="loss"),
    *in_full(
        Case("flush", clips=True, rank=0, tp=2),
        Case("continuous", clips=False, rank=1, dp=2),
        Case("continuous", clips=False, rank=0, pp=2, fault="nan"),
        Case("flush", clips=False, rank=0, fault="huge"),
        Case("continuous", clips=False, rank=1, pp=2, fault="loss"),
    ),
]
"""On two stages every two of template, clipping and rank meet, and every mesh and fault is there; in a full
run each of them also with other neighbours."""

SAID = MappingProxyType(
    {
        "inf": "the gradient norm is inf",
        "nan": "the gradient norm is nan",
        "loss": "the loss is nan",
        "huge": "the gradient norm is 1e\\+25 .*too large for AdamW to square",
        "data": "OSError: the disk is gone (rank ",
        "vocabulary": "UserError: token 1000",
        "adapter": "ValueError: no such kernel (rank ",
        "memory": "OutOfMemoryError: at 80 GiB (rank ",
    }
)


def spoil(rank: int, *, case: Case) -> None:
    """Have one rank's part of task ``b`` go wrong in one step; everything around it is the product's own."""
    from runtime.engine.stepper import Stepper
    from runtime.tasks.losses import LossLedger

    if rank != case.rank:
        return
    if case.fault == "loss":
        close = LossLedger.close

        def close_badly(self, action):
            targets, nll = close(self, action)
            if action.number == BAD_STEP and "b" in targets:
                nll[list(targets).index("b")] = float("nan")
            return targets, nll

        LossLedger.close = close_badly
        return
    sums = Stepper._sum_gradients

    def sum_badly(self, action, active):
        for tenant in active:
            if tenant.task.id == "b" and action.number == BAD_STEP:
                value = 1e25 if case.fault == "huge" else float(case.fault)
                next(iter(tenant.parameters.values())).grad.view(-1)[0] = value
        return sums(self, action, active)

    Stepper._sum_gradients = sum_badly


OTHER_CASES = [
    Case("flush", clips=False, rank=0, pp=2, fault="data"),
    Case("continuous", clips=False, rank=0, fault="vocabulary"),
    Case("continuous", clips=False, rank=1, pp=2, fault="memory"),
    Case("continuous", clips=True, rank=0, tp=2, fault="adapter"),
    Case("flush", clips=False, rank=1, dp=2, fault="adapter"),
    *in_full(
        Case("continuous", clips=True, rank=1, dp=2, fault="data"),
        Case("flush", clips=False, rank=0, pp=2, fault="adapter"),
        Case("continuous", clips=False, rank=3, pp=2, dp=2, fault="memory"),
    ),
]
"""Faults that are no number's: data is read by every rank alike, an adapter fails where it is, on all shards;
memory is short on one rank."""


def break_task(rank: int, *, case: Case) -> None:
    """Have something of task ``b`` raise from one step on, or have tokens that mean nothing."""
    import torch

    from muxtune.tasks import Example, TaskData
    from runtime.backbone.linear import SharedLinear
    from runtime.engine.runner import StageRunner

    if case.fault in {"data", "vocabulary"}:
        batch = TaskData.batch

        def broken_batch(self, step):
            examples = batch(self, step)
            if self.task.id == "b" and step >= BAD_STEP:
                if case.fault == "data":
                    raise OSError("the disk is gone")
                examples = [Example(example.tokens + 10**6, example.target_start) for example in examples]
            return examples

        TaskData.batch = broken_batch
        return
    if case.tp == 1 and rank != case.rank:
        return
    step_now = [0]
    forward, added = StageRunner._forward, SharedLinear._added

    def noting_forward(self, action, *others):
        step_now[0] = action.number // self._plan.microbatches[action.htask]
        forward(self, action, *others)

    def failing_added(self, x, batch):
        spans = dict(zip(batch.task_ids, batch.spans, strict=True))
        if "b" in spans and spans["b"].start < spans["b"].stop and step_now[0] >= BAD_STEP:
            if case.fault == "memory":
                raise torch.OutOfMemoryError("at 80 GiB")
            raise ValueError("no\nsuch kernel")
        return added(self, x, batch)

    StageRunner._forward, SharedLinear._added = noting_forward, failing_added
