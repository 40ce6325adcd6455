"""How ranks that sum together come together."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from runtime.distributed.teams import GroupTeam


class FakeWork:
    def wait(self) -> None:
        pass


@pytest.mark.parametrize(("backend", "sums"), [("nccl", ["cuda"]), ("gloo", [])])
def test_ranks_of_a_gpu_team_are_joined_when_it_is_made_and_not_in_a_run(backend, sums, monkeypatch):
    made, found = [], []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, device: made.append(device) or zeros(n))
    monkeypatch.setattr(dist, "get_backend", lambda group: backend)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [1, 3])
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **options: found.append(made[-1]) or FakeWork())
    assert GroupTeam("its group").peer == 3
    assert found == sums
