"""The contest of attention backends, before anything is measured that depends on which one is used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from muxtune.graph.attention_backends import (
    AttentionContest,
    AttentionName,
    AttentionSuite,
    AttentionTime,
    choose_attention,
    contest_streams,
)
from muxtune.graph.operators import PHASES
from muxtune.model import ModelSpec
from profiler.devices import Device
from profiler.measure import time_together
from profiler.rendezvous import Rendezvous


def hold_contest(
    suite: AttentionSuite,
    model: ModelSpec,
    device: Device,
    *,
    rendezvous: Rendezvous,
    ranks: int,
    folder: Path,
    limit_s: float,
) -> AttentionContest:
    """Time every backend that a run may use on this device.

    All ranks measure at the same time and see the same medians over ranks, so they choose alike.

    Args:
        suite: Suite that has the backends.
        model: The backbone.
        device: Device of this rank.
        rendezvous: Rendezvous of the ranks that measure at the same time.
        ranks: Number of these ranks.
        folder: Where ranks leave their figures for each other.
        limit_s: Seconds per backend and stream.
    """
    streams = contest_streams(model.max_positions)
    needs = suite.attention_needs(model, device.name)
    running = [name for name, missing in needs.items() if missing is None]
    own: dict[AttentionName, list[list[float]]] = {name: [] for name in running}
    for lengths in streams:
        built = [suite.with_attention(name).build_attention(lengths, model, device.name) for name in running]
        calls = [each[phase] for each in built for phase in PHASES]
        # In turn, so that a clock that drifts, or other load, meets all of them.
        samples = iter(time_together([calls], device.timer, rendezvous, limit_s * len(running)))
        for name in running:
            own[name].append([next(samples).median_s for _ in PHASES])
    (folder / f"attention-{device.rank}.json").write_text(json.dumps(own))
    rendezvous.barrier()
    every = [json.loads((folder / f"attention-{rank}.json").read_text()) for rank in range(ranks)]
    times = [_time(name, [each[name] for each in every]) for name in running]
    return AttentionContest(
        streams=streams,
        times=(
            *times,
            *(AttentionTime(backend=name, missing=why) for name, why in needs.items() if why is not None),
        ),
        chosen=choose_attention({each.backend: each.seconds for each in times}),
    )


def _time(name: AttentionName, ranks: Sequence[Sequence[Sequence[float]]]) -> AttentionTime:
    """Medians over ranks of ``[rank][stream][phase]`` seconds."""
    forward, backward = np.median(np.array(ranks), axis=0).T.tolist()
    return AttentionTime(backend=name, fwd_s=tuple(forward), bwd_s=tuple(backward))
