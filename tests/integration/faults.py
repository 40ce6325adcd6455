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
    fault: Literal["inf", "nan", "loss", "huge"] = "inf"

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
        sums(self, action, active)

    Stepper._sum_gradients = sum_badly
