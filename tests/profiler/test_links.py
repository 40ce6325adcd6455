"""Messages and collectives between real processes over gloo."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

from muxtune.graph.operators import COLLECTIVE_KINDS, Operator
from muxtune.model import PRESETS
from profiler.devices import CpuDevice
from profiler.links import RankGroup

MODEL = PRESETS["llama-tiny"]


class TwoWays(CpuDevice):
    """A core whose messages go as a GPU's: a group per direction."""

    group_per_direction = True


def measure(device_class, path, ranks, rank, ops, changes):
    """One rank; what it measured, and what its collectives did to tensors."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    sizes = sorted({op.dims[1] for op in ops if op.kind in COLLECTIVE_KINDS})
    group = RankGroup(device_class(rank), path, ranks, sizes)
    model = MODEL.model_copy(update=changes)
    measured = [reading for op in ops for reading in group.measure(op, model, 0.01)]
    group.close()
    return measured


def measure_overlap(device, path, ranks, rank, tokens, compute):
    """One rank's overlap, with a computation that the test gives."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    group = RankGroup(device(rank), path, ranks, [])
    found = group.overlap(tokens, compute, MODEL, 0.1)
    group.close()
    return found


def wait_a_millisecond():
    time.sleep(1e-3)


@pytest.mark.integration
def test_what_leaves_the_processor_alone_overlaps(tmp_path):
    """Sleeping takes no processor time, so that the all-reduce runs beside it for nearly nothing."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        ranks = [
            pool.submit(measure_overlap, CpuDevice, tmp_path / "store", 2, rank, 4096, wait_a_millisecond)
            for rank in range(2)
        ]
        found, nothing = [rank.result(60) for rank in ranks]
    assert nothing is None  # rank 0 speaks for all
    assert found.tokens == 4096
    assert found.compute_s > 1e-3 * found.calls
    assert found.both_s > found.compute_s - 1e-3
    # One after the other would be 1.0.
    assert found.contention < 1.0


def on_ranks(tmp_path, ops, *, ranks=2, device_class=CpuDevice, **changes):
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(ranks, mp_context=context) as pool:
        futures = [
            pool.submit(measure, device_class, tmp_path / "store", ranks, rank, ops, changes)
            for rank in range(ranks)
        ]
        return [future.result(60) for future in futures]


def check(sample):
    assert 1e-7 < sample.p10_s <= sample.median_s <= sample.p90_s < 1.0
    assert sample.repetitions >= 5


@pytest.mark.integration
@pytest.mark.parametrize("device_class", [CpuDevice, TwoWays])
def test_a_message_gives_elapsed_and_processor_time_and_collectives_one_each(tmp_path, device_class):
    ops = [Operator("p2p", (4096,)), *(Operator(kind, (8192, 2)) for kind in sorted(COLLECTIVE_KINDS))]
    first, second = on_ranks(tmp_path, ops, device_class=device_class)
    assert [op for op, _ in first] == [ops[0], Operator("message", (4096,)), *ops[1:]]
    assert second == []  # rank 0 speaks for all
    for _, sample in first:
        check(sample)


@pytest.mark.integration
def test_groups_are_the_first_ranks_and_large_tensors_take_longer(tmp_path):
    ops = [Operator("all_reduce", dims) for dims in ((4096, 2), (32 << 20, 2), (4096, 3))]
    first, *others = on_ranks(tmp_path, ops, ranks=3, ffn=1)  # next to nothing is computed in between
    assert others == [[], []]
    assert [op for op, _ in first] == ops
    for _, sample in first:
        check(sample)
    assert first[1][1].median_s > 2 * first[0][1].median_s


@pytest.mark.integration
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_tensors_have_the_backbones_dtype_and_odd_sizes_are_rounded(tmp_path, dtype):
    ops = [Operator(kind, (bytes_, 2)) for kind in sorted(COLLECTIVE_KINDS) for bytes_ in (1, 4099)]
    first, _ = on_ranks(tmp_path, ops, dtype=dtype)
    assert [op for op, _ in first] == ops
