"""Does grouping low-rank adapters of several tasks pay on a CPU?

Adapters of 1 to 64 tasks on one linear, forward and backward, with equally many tokens each:

loop     task by task, as the runtime does it on a CPU
batched  one batched product for all tasks of one rank; spans have to be equally long, and factors are copied
         next to each other, since their optimizers keep them apart
masked   one product with the factors of all tasks side by side, of which each token keeps those of its task;
         spans may have any length, but every token is multiplied with every task's factors

All compute the same, which is checked first. Prints the median time of the loop per task, in processor time,
and how many times as fast the others are, from pairs in turn within one run; above 1 grouping pays.

    python -m benchmarks.adapters [--hidden 256] [--rounds 15]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import median

import torch
from torch import Tensor

from benchmarks.helpers.machine import machine_line
from runtime.peft.lora_pieces import add_input_gradients_, add_updates_, factor_gradients

TASKS, RANKS, TOKENS = (1, 4, 16, 64), (1, 8, 64), (8, 32, 128)

Result = list[Tensor]
"""Output, gradient of the input, and of all A and B."""


@dataclass(frozen=True)
class Case:
    """Tasks of one rank on a square linear; numbers are drawn from a seed."""

    tasks: int
    rank: int
    tokens: int
    hidden: int
    x: Tensor = field(init=False)
    grad: Tensor = field(init=False)
    a: list[Tensor] = field(init=False)
    b: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        rows = self.tasks * self.tokens
        for name in ("x", "grad"):
            object.__setattr__(self, name, torch.randn(rows, self.hidden, generator=draw))
        for name, shape in (("a", (self.rank, self.hidden)), ("b", (self.hidden, self.rank))):
            drawn = [torch.randn(shape, generator=draw) / self.hidden**0.5 for _ in range(self.tasks)]
            object.__setattr__(self, name, drawn)

    def targets(self) -> tuple[Tensor, Tensor]:
        """Output and gradient of the input so far."""
        return torch.zeros_like(self.grad), torch.zeros_like(self.x)


def loop(case: Case) -> Result:
    """The runtime's way."""
    y, dx = case.targets()
    t, h = case.tokens, case.hidden
    pieces = [(k * t, (k + 1) * t, 0, h, 1.0) for k in range(case.tasks)]
    factors = [factor for pair in zip(case.a, case.b, strict=True) for factor in pair]
    downs = add_updates_(y, case.x, pieces, factors, grouped=False)
    ddowns = add_input_gradients_(case.grad, dx, pieces, factors, grouped=False)
    grads = factor_gradients(case.grad, case.x, pieces, factors, downs, ddowns, grouped=False)
    return [y, dx, *grads]


def batched(case: Case) -> Result:
    """Batched products over the tasks."""
    y, dx = case.targets()
    x_batch, grad_batch, y_batch, dx_batch = (
        each.view(case.tasks, case.tokens, case.hidden) for each in (case.x, case.grad, y, dx)
    )
    a_batch, b_batch = torch.stack(case.a), torch.stack(case.b)
    down = a_batch @ x_batch.mT
    y_batch.baddbmm_(down.mT, b_batch.mT)
    ddown = b_batch.mT @ grad_batch.mT
    dx_batch.baddbmm_(ddown.mT, a_batch)
    return _by_task(y, dx, ddown @ x_batch, (down @ grad_batch).mT)


def masked(case: Case) -> Result:
    """All factors side by side, under a mask."""
    y, dx = case.targets()
    a, b = torch.cat(case.a), torch.cat(case.b, dim=1)
    own = torch.block_diag(*[torch.ones(case.rank, case.tokens)] * case.tasks)
    down = (a @ case.x.t()).mul_(own)
    y.addmm_(down.t(), b.t())
    ddown = (b.t() @ case.grad.t()).mul_(own)
    dx.addmm_(ddown.t(), a)
    da = (ddown @ case.x).view(case.tasks, case.rank, -1)
    db = (down @ case.grad).view(case.tasks, case.rank, -1).mT
    return _by_task(y, dx, da, db)


def _by_task(y: Tensor, dx: Tensor, da: Tensor, db: Tensor) -> Result:
    grads = zip(da.unbind(), db.unbind(), strict=True)
    return [y, dx, *(grad for pair in grads for grad in pair)]


WAYS: dict[str, Callable[[Case], Result]] = {"batched": batched, "masked": masked}


def measure_case(case: Case, rounds: int) -> tuple[float, list[float]]:
    """Median seconds of the loop per task, and how many times as fast each other way is."""
    expected = loop(case)
    for way in WAYS.values():
        for actual, wanted in zip(way(case), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    taken: list[list[float]] = [[] for _ in range(1 + len(WAYS))]
    for _ in range(rounds):
        for times, way in zip(taken, (loop, *WAYS.values()), strict=True):
            start_s = time.thread_time()
            way(case)
            times.append(time.thread_time() - start_s)
    loops_s, *others_s = taken
    ratios = [_median_ratio(loops_s, other_s) for other_s in others_s]
    return median(loops_s) / case.tasks, ratios


def _median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    return median(a / b for a, b in zip(first, second, strict=True))


@torch.no_grad()
def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"machine: {machine_line()}")
    print(f"a linear of {arguments.hidden} x {arguments.hidden}, medians of {arguments.rounds} rounds\n")
    print(
        f"{'rank':>5} {'tokens':>7} {'tasks':>6} {'loop, us a task':>16}" + "".join(f"{w:>9}" for w in WAYS)
    )
    for rank, tokens, tasks in product(RANKS, TOKENS, TASKS):
        loop_s, ratios = measure_case(Case(tasks, rank, tokens, arguments.hidden), arguments.rounds)
        shown = "".join(f"{ratio:9.2f}" for ratio in ratios)
        print(f"{rank:5} {tokens:7} {tasks:6} {loop_s * 1e6:16.0f}{shown}", flush=True)


if __name__ == "__main__":
    main()
