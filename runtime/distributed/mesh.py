"""Where a rank stands: which replica, stage and shard it is, and with whom it sums what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import product
from typing import Literal

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from muxtune.placement import Placement
from muxtune.plan import Parallelism
from runtime.device.devices import CPU, RankDevice
from runtime.device.torch_internals import default_store
from runtime.distributed.peers import or_peer_lost
from runtime.distributed.sharding import Shard
from runtime.distributed.teams import GroupTeam, StageTeam
from runtime.distributed.transport import Link, open_link

Direction = Literal["F", "B"]
"""Direction of messages between stages: of forwards, to the next stage; of backwards, to the one before."""

BUILD_TIMEOUT_S = 60.0
"""How long ranks wait for each other while they build groups, to which they come at the same time; however
short they would wait for a message, for a busy machine may keep one of them."""


class RankMesh:
    """A rank's place in the mesh of replicas, stages and shards; shards are neighbours, replicas far apart.

    Args:
        parallelism: How large the mesh is.
        rank: Rank whose place it is; torch.distributed is up if there are several.
        peer_timeout_s: How long a sum waits for a rank; half an hour by default, like gloo.
        device: Device of the rank.

    Raises:
        PeerLostError: Another rank is gone; a dead one is noticed after :data:`BUILD_TIMEOUT_S` at most.
    """

    def __init__(
        self,
        parallelism: Parallelism,
        rank: int,
        peer_timeout_s: float = 1800.0,
        device: RankDevice = CPU,
    ) -> None:
        self.device = device
        self._parallelism = parallelism
        self._peer_timeout = timedelta(seconds=peer_timeout_s)
        # On which node a rank stands is for whoever prices it; all ranks may share one here.
        self._placement = Placement(parallelism.tp, parallelism.pp, parallelism.dp, parallelism.ranks)
        self.replica, self.stage, shard = self._placement.coordinates(rank)
        with self._short_waits():
            tp, pp, dp = self._build_teams()
        self.stopwatch = device.stopwatch()
        """Stopwatch of the rank."""
        self.team = None if tp is None else StageTeam(tp, self.stopwatch)
        """The ranks of the same replica and stage; None if there is one."""
        self.shard = Shard(shard, parallelism.tp, self.team)
        """The rank's part of the stage."""
        self.stages = pp
        """The ranks of the same replica and shard; None if there is one stage."""
        self.replicas = dp
        """The ranks of the same stage and shard; None if there is one replica."""
        with self._short_waits():
            self._own_groups = self._build_own_groups() if device.own_groups and dist.is_initialized() else {}
            self.verdicts = self._build_verdicts()
        """The ranks of ``stages``, by gloo: what waits there for others must not hold up the device."""

    @contextmanager
    def _short_waits(self) -> Iterator[None]:
        """Inside, what a rank leaves in the store for others is not waited for longer than a group is."""
        if not dist.is_initialized():
            yield
            return
        store = default_store()
        usual: timedelta = store.timeout  # type: ignore[attr-defined]  # not in stub
        store.set_timeout(timedelta(seconds=BUILD_TIMEOUT_S))
        try:
            yield
        finally:
            store.set_timeout(usual)

    def _build_teams(self) -> list[GroupTeam | None]:
        """One per dimension: tp, pp, dp."""
        sizes = {name: getattr(self._parallelism, name) for name in ("dp", "pp", "tp")}
        if not dist.is_initialized():
            return [None, None, None]
        device = self.device
        build = partial(
            init_device_mesh,
            device.kind,
            tuple(sizes.values()),
            mesh_dim_names=tuple(sizes),
            # Never the default group, which a dimension of all ranks would get: sums must not queue behind
            # the messages between stages, which are under way in that one.
            backend_override={
                name: (device.backend, device.group_options(BUILD_TIMEOUT_S)) for name in sizes
            },
        )
        mesh = or_peer_lost(build)
        for name in sizes:
            mesh.get_group(name).set_timeout(self._peer_timeout)
        return [GroupTeam(mesh.get_group(name)) if sizes[name] > 1 else None for name in ("tp", "pp", "dp")]

    def _build_own_groups(self) -> dict[tuple[Direction, int], dist.ProcessGroup]:
        """A group of two ranks per direction and pair of stages; only this rank's, but all ranks make all.

        Returns:
            Groups by direction and lower stage of the pair.
        """
        p = self._parallelism
        timeout = timedelta(seconds=BUILD_TIMEOUT_S)
        own = {}
        directions: tuple[Direction, ...] = ("F", "B")
        for replica, shard, stage, direction in product(
            range(p.dp), range(p.tp), range(p.pp - 1), directions
        ):
            ranks = list(self._placement.boundary(replica, stage, shard))
            build = partial(dist.new_group, ranks, timeout=timeout, backend=self.device.backend)
            group = or_peer_lost(build)
            if (replica, shard) == (self.replica, self.shard.index) and self.stage in {stage, stage + 1}:
                own[direction, stage] = group
        # NCCL joins two ranks at their first message, and both wait for that: here, where both come to it in
        # the same order, and not when one posts a receive that the other is far from.
        for (direction, stage), group in own.items():
            upper = self.stage == stage + 1
            peer = self.neighbour(stage if upper else stage + 1)
            open_link(Link(peer, self.device, group), sends=(direction == "B") == upper)
            group.set_timeout(self._peer_timeout)
        return own

    def _build_verdicts(self) -> GroupTeam | None:
        if self.stages is None or self.device.backend == "gloo":
            return self.stages
        p = self._parallelism
        timeout = timedelta(seconds=BUILD_TIMEOUT_S)
        team = None
        for replica, shard in product(range(p.dp), range(p.tp)):  # all ranks make all groups
            ranks = [(replica * p.pp + stage) * p.tp + shard for stage in range(p.pp)]
            group = or_peer_lost(partial(dist.new_group, ranks, timeout=timeout, backend="gloo"))
            if (replica, shard) == (self.replica, self.shard.index):
                group.set_timeout(self._peer_timeout)
                team = GroupTeam(group)
        return team

    @property
    def stage_count(self) -> int:
        """Stages of the pipeline."""
        return self._parallelism.pp

    @property
    def first(self) -> bool:
        """Whether the stage embeds the tokens."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether the stage has the head."""
        return self.stage == self._parallelism.pp - 1

    @property
    def reports(self) -> bool:
        """Whether it is the rank of its stage that reports what all of them have alike."""
        return self.replica == 0 and self.shard.index == 0

    def neighbour(self, stage: int) -> int:
        """Rank of the same replica and shard on another stage."""
        return self._placement.rank(self.replica, stage, self.shard.index)

    def link(self, direction: Direction, stage: int) -> Link:
        """One direction to or from a neighbouring stage."""
        group = self._own_groups.get((direction, min(stage, self.stage)))
        return Link(self.neighbour(stage), self.device, group)
