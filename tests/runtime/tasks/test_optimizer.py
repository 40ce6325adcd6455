from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from runtime.tasks.optimizer import build_optimizer, learning_rate
from tests.runtime.worlds import make_task


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 12])
def test_learning_rates_are_those_of_transformers(schedule, warmup):
    task = make_task("t", learning_rate=0.3, lr_schedule=schedule, warmup_steps=warmup, steps=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    for step in range(10):
        assert learning_rate(task, step) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15
        )
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str)
def test_steps_are_those_of_plain_adamw(dtype, tolerance):
    torch.manual_seed(0)
    start = [torch.randn(8, 50, dtype=dtype), torch.randn(30, 8, dtype=dtype)]
    ours, plain = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    task = make_task("t", learning_rate=1e-2, weight_decay=0.1)
    optimizers = [
        build_optimizer(ours, task),
        torch.optim.AdamW(plain, lr=1e-2, weight_decay=0.1, foreach=False, fused=False),
    ]
    for _ in range(20):
        for a, b in zip(ours, plain, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
