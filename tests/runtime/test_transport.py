"""What an outbox keeps."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from runtime.transport import Outbox


@dataclass
class FakeWork:
    """Like gloo's: it is complete only once somebody has waited."""

    waits: int = 0

    def wait(self) -> None:
        self.waits += 1

    def is_completed(self) -> bool:
        return self.waits > 0


def test_an_outbox_keeps_no_more_than_the_receiver_can_have_open(monkeypatch: pytest.MonkeyPatch):
    works: list[FakeWork] = []

    def isend(tensor: torch.Tensor, target: int, tag: int) -> FakeWork:
        works.append(FakeWork())
        return works[-1]

    monkeypatch.setattr(dist, "isend", isend)
    outbox = Outbox(1, room=2)
    kept = []
    for _ in range(50):
        outbox.send(torch.ones(10))
        kept.append(outbox.kept_bytes)
    assert kept == [40] + 49 * [80]
    assert [work.waits for work in works] == 48 * [1] + 2 * [0]
    outbox.flush()
    assert outbox.kept_bytes == 0
    assert all(work.waits == 1 for work in works)
