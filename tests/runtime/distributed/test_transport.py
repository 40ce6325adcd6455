"""Messages between stages, and what an outbox keeps of them."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from multiprocessing import Queue
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from muxtune.plan import Parallelism
from runtime.device.devices import Cpu
from runtime.distributed.mesh import RankMesh
from runtime.distributed.transport import Inbox, Link, Outbox


@dataclass
class FakeWork:
    """Like gloo's: it is complete only once somebody has waited."""

    waits: int = 0

    def wait(self) -> None:
        self.waits += 1

    def is_completed(self) -> bool:
        return self.waits > 0


class OwnGroups(Cpu):
    """As on GPUs: a group for each direction and pair of stages; nothing goes by tags."""

    own_groups = True


class LikeGpu(OwnGroups):
    """Receives are posted when they are needed."""

    posts_ahead = False


def _pipeline(rank: int, folder: str, results: Queue, device: Cpu) -> None:
    """A stage that adds its rank to activations, and multiplies gradients by 10."""
    dist.init_process_group("gloo", Path(folder, "store").as_uri(), rank=rank, world_size=3)
    mesh = RankMesh(Parallelism(pp=3, tp=1, dp=1, layers_per_stage=(1, 1, 1)), rank, 30.0, device)
    sizes = [2, 0, 3, 1]  # one micro-batch has no tokens
    seen = []
    inboxes, outboxes = {}, {}
    if not mesh.first:
        inboxes["F"] = Inbox(mesh.link("F", mesh.stage - 1), sizes, 1, torch.float32)
        outboxes["B"] = Outbox(mesh.link("B", mesh.stage - 1), room=4)
    if not mesh.last:
        inboxes["B"] = Inbox(mesh.link("B", mesh.stage + 1), sizes, 1, torch.float32)
        outboxes["F"] = Outbox(mesh.link("F", mesh.stage + 1), room=4)
    for number, tokens in enumerate(sizes):
        x = torch.full((tokens, 1), float(number))
        outboxes.get("F", _Nowhere).send(inboxes["F"].receive() + rank if "F" in inboxes else x)
        seen.append(None)
        gradient = inboxes["B"].receive() if "B" in inboxes else x + 1
        outboxes.get("B", _Nowhere).send(10 * gradient)
        seen[-1] = gradient.flatten().tolist()
    for outbox in outboxes.values():
        outbox.flush()
    groups = {id(mesh.link(d, s).group) for d in ("F", "B") for s in (rank - 1, rank + 1) if 0 <= s < 3}
    dist.barrier()
    results.put((rank, seen, len(groups)))
    results.close()
    results.join_thread()
    dist.destroy_process_group()


class _Nowhere:
    send = staticmethod(lambda _: None)


@pytest.mark.parametrize("device", [OwnGroups(), LikeGpu()], ids=["posted ahead", "posted when needed"])
def test_directions_with_groups_of_their_own_do_not_hold_each_other_up(tmp_path, device):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = [(rank, str(tmp_path), results, device) for rank in range(3)]
    ranks = [context.Process(target=_pipeline, args=each) for each in arguments]
    for process in ranks:
        process.start()
    found = sorted(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    gradients = [[n + 1.0] * tokens for n, tokens in enumerate([2, 0, 3, 1])]
    for rank, seen, groups in found:
        assert seen == [[g * 10.0 ** (2 - rank) for g in each] for each in gradients]
        assert groups == (4 if rank == 1 else 2)  # two directions with each neighbour


@pytest.mark.parametrize(
    ("device", "posted"), [(Cpu(), [2, 3, 4, 4, 4]), (LikeGpu(), [0, 1, 2, 3, 4])], ids=["cpu", "like a GPU"]
)
def test_receives_are_posted_ahead_where_a_waiting_one_costs_nothing(device, posted, monkeypatch):
    works: list[FakeWork] = []

    def irecv(tensor: torch.Tensor, source: int, group: None, tag: int) -> FakeWork:
        works.append(FakeWork())
        return works[-1]

    monkeypatch.setattr(dist, "irecv", irecv)
    inbox = Inbox(Link(1, device), [3] * 4, 2, torch.float32)
    seen = [len(works)]
    for number in range(4):
        assert inbox.receive().shape == (3, 2)
        assert [work.waits for work in works[: number + 1]] == [1] * (number + 1)
        seen.append(len(works))
    assert seen == posted


def test_an_outbox_keeps_no_more_than_the_receiver_can_have_open(monkeypatch: pytest.MonkeyPatch):
    works: list[FakeWork] = []

    def isend(tensor: torch.Tensor, target: int, group: None, tag: int) -> FakeWork:
        works.append(FakeWork())
        return works[-1]

    monkeypatch.setattr(dist, "isend", isend)
    outbox = Outbox(Link(1), room=2)
    kept = []
    for _ in range(50):
        outbox.send(torch.ones(10))
        kept.append(outbox.kept_bytes)
    assert kept == [40] + 49 * [80]
    assert [work.waits for work in works] == 48 * [1] + 2 * [0]
    outbox.flush()
    assert outbox.kept_bytes == 0
    assert all(work.waits == 1 for work in works)
