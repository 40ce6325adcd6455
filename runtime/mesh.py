"""Where a rank stands: which replica, stage and shard it is, and with whom it sums what."""

from __future__ import annotations

from datetime import timedelta
from itertools import product
from typing import Literal

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from muxtune.plan import Parallelism
from runtime.devices import CPU, RankDevice
from runtime.sharding import Shard
from runtime.teams import GroupTeam, StageTeam
from runtime.transport import Link, open_link

Direction = Literal["F", "B"]
"""Of messages between stages: of forwards, to the next stage; of backwards, to the one before."""


class RankMesh:
    """A rank's place in the mesh of replicas, stages and shards; shards are neighbours, replicas far apart.

    Args:
        parallelism: How large the mesh is.
        rank: Whose place; torch.distributed is up if there are several.
        peer_timeout_s: How long a sum waits for a rank; gloo's half an hour by default.
        device: Of the rank.
    """

    def __init__(
        self,
        parallelism: Parallelism,
        rank: int,
        peer_timeout_s: float | None = None,
        device: RankDevice = CPU,
    ) -> None:
        self.device = device
        self._parallelism = parallelism
        self._peer_timeout_s = peer_timeout_s
        self.replica, within = divmod(rank, parallelism.pp * parallelism.tp)
        self.stage, shard = divmod(within, parallelism.tp)
        tp, pp, dp = self._build_teams()
        self.stopwatch = device.stopwatch()
        """Of the rank."""
        self.team = None if tp is None else StageTeam(tp, self.stopwatch)
        """The ranks of the same replica and stage; None if there is one."""
        self.shard = Shard(shard, parallelism.tp, self.team)
        """Its part of the stage."""
        self.stages = pp
        """The ranks of the same replica and shard; None if there is one stage."""
        self.replicas = dp
        """The ranks of the same stage and shard; None if there is one replica."""
        self._own_groups = self._build_own_groups() if device.own_groups and dist.is_initialized() else {}

    def _build_teams(self) -> list[GroupTeam | None]:
        """One per dimension: tp, pp, dp."""
        sizes = {name: getattr(self._parallelism, name) for name in ("dp", "pp", "tp")}
        if not dist.is_initialized():
            return [None, None, None]
        device = self.device
        mesh = init_device_mesh(
            device.kind,
            tuple(sizes.values()),
            mesh_dim_names=tuple(sizes),
            # Never the default group, which a dimension of all ranks would get: sums must not queue behind
            # the messages between stages, which are under way in that one.
            backend_override={
                name: (device.backend, device.group_options(self._peer_timeout_s)) for name in sizes
            },
        )
        return [GroupTeam(mesh.get_group(name)) if sizes[name] > 1 else None for name in ("tp", "pp", "dp")]

    def _build_own_groups(self) -> dict[tuple[Direction, int], dist.ProcessGroup]:
        """A group of two ranks per direction and pair of stages; only this rank's, but all ranks make all.

        Returns:
            By direction, and the lower stage of the pair.
        """
        p = self._parallelism
        timeout = None if self._peer_timeout_s is None else timedelta(seconds=self._peer_timeout_s)
        own = {}
        directions: tuple[Direction, ...] = ("F", "B")
        for replica, shard, stage, direction in product(
            range(p.dp), range(p.tp), range(p.pp - 1), directions
        ):
            ranks = [(replica * p.pp + s) * p.tp + shard for s in (stage, stage + 1)]
            group = dist.new_group(ranks, timeout=timeout, backend=self.device.backend)
            if (replica, shard) == (self.replica, self.shard.index) and self.stage in {stage, stage + 1}:
                own[direction, stage] = group
        # NCCL joins two ranks at their first message, and both wait for that: here, where both come to it in
        # the same order, and not when one posts a receive that the other is far from.
        for (direction, stage), group in own.items():
            upper = self.stage == stage + 1
            peer = self.neighbour(stage if upper else stage + 1)
            open_link(Link(peer, self.device, group), sends=(direction == "B") == upper)
        return own

    @property
    def first(self) -> bool:
        """Whether the stage embeds the tokens."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether the stage has the head."""
        return self.stage == self._parallelism.pp - 1

    @property
    def speaks(self) -> bool:
        """Whether it is the rank of its stage that reports what all of them have alike."""
        return self.replica == 0 and self.shard.index == 0

    def neighbour(self, stage: int) -> int:
        """Rank of the same replica and shard on another stage."""
        tp, pp = self._parallelism.tp, self._parallelism.pp
        return (self.replica * pp + stage) * tp + self.shard.index

    def link(self, direction: Direction, stage: int) -> Link:
        """One direction to or from a neighbouring stage."""
        group = self._own_groups.get((direction, min(stage, self.stage)))
        return Link(self.neighbour(stage), self.device, group)
