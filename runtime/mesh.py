"""Where a rank stands: which replica, stage and shard it is, and with whom it sums what."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from muxtune.plan import Parallelism
from runtime.sharding import Shard
from runtime.teams import GroupTeam, Team


class RankMesh:
    """A rank's place in the mesh of replicas, stages and shards; shards are neighbours, replicas far apart.

    Args:
        parallelism: How large the mesh is.
        rank: Whose place; torch.distributed is up if there are several.
        peer_timeout_s: How long a sum waits for a rank; gloo's half an hour by default.
    """

    def __init__(self, parallelism: Parallelism, rank: int, peer_timeout_s: float | None = None) -> None:
        self._parallelism = parallelism
        self._peer_timeout_s = peer_timeout_s
        self.replica, within = divmod(rank, parallelism.pp * parallelism.tp)
        self.stage, shard = divmod(within, parallelism.tp)
        tp, pp, dp = self._build_teams()
        self.shard = Shard(shard, parallelism.tp, tp)
        """Its part of the stage, and the ranks of the same replica and stage."""
        self.stages = pp
        """The ranks of the same replica and shard; None if there is one stage."""
        self.replicas = dp
        """The ranks of the same stage and shard; None if there is one replica."""

    def _build_teams(self) -> list[Team | None]:
        """One per dimension: tp, pp, dp."""
        sizes = {name: getattr(self._parallelism, name) for name in ("dp", "pp", "tp")}
        if not dist.is_initialized():
            return [None, None, None]
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # Options in torch's stubs
        if self._peer_timeout_s is not None:  # groups do not inherit that of the default one
            options._timeout = timedelta(seconds=self._peer_timeout_s)
        mesh = init_device_mesh(
            "cpu",
            tuple(sizes.values()),
            mesh_dim_names=tuple(sizes),
            # Never the default group, which a dimension of all ranks would get: sums must not queue behind
            # the messages between stages, which are under way in that one.
            backend_override=dict.fromkeys(sizes, ("gloo", options)),
        )
        return [GroupTeam(mesh.get_group(name)) if sizes[name] > 1 else None for name in ("tp", "pp", "dp")]

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
