"""Adapters: a pair alone against the pairs of many tasks in shared launches."""

import pytest

from muxtune.costs.adapters import Pair, grouped_seconds, moved_seconds, pair_kernels, pair_seconds
from muxtune.costs.gpu import load_gpu

DEVICES = ("a40", "a100", "h100")
SMALL = [Pair(in_features=4096, out_features=4096, r=r, tokens=128) for r in (4, 8, 16, 64)]


def pair(tokens, r=16):
    return Pair(in_features=4096, out_features=4096, r=r, tokens=tokens)


def grouped(gpu, pairs, phase, factor_bytes=2):
    return grouped_seconds(gpu, pairs, phase, element_bytes=2, factor_bytes=factor_bytes)


def alone(gpu, one, phase, factor_bytes=2):
    return pair_seconds(gpu, one, phase, element_bytes=2, factor_bytes=factor_bytes)


@pytest.mark.parametrize("phase", ["fwd", "bwd"])
@pytest.mark.parametrize("device", DEVICES)
def test_small_tasks_of_different_rank_together_take_less_than_one_by_one(device, phase):
    gpu = load_gpu(device)
    together_s = grouped(gpu, SMALL, phase)
    assert together_s < 0.9 * sum(grouped(gpu, [one], phase) for one in SMALL)
    assert together_s < 0.8 * sum(alone(gpu, one, phase) for one in SMALL)
    assert together_s >= max(grouped(gpu, [one], phase) for one in SMALL)


@pytest.mark.parametrize("phase", ["fwd", "bwd"])
@pytest.mark.parametrize("device", DEVICES)
def test_large_tasks_take_a_time_in_proportion_to_their_tokens(device, phase):
    gpu = load_gpu(device)
    assert grouped(gpu, [pair(65536)], phase) / grouped(gpu, [pair(32768)], phase) == pytest.approx(
        2, rel=0.03
    )
    assert alone(gpu, pair(65536), phase) / alone(gpu, pair(32768), phase) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("device", DEVICES)
def test_a_pair_is_no_faster_than_its_bytes(device):
    gpu = load_gpu(device)
    moved = 2 * (8192 * 4096 * 3)  # the input is read, the output read and written
    for seconds in (grouped(gpu, [pair(8192)], "fwd"), alone(gpu, pair(8192), "fwd")):
        assert seconds > moved / gpu.pointwise.l2_bytes_per_s


def test_higher_ranks_and_more_precision_never_take_less():
    gpu = load_gpu("a100")
    for price in (
        lambda one, bytes_: grouped(gpu, [one], "bwd", bytes_),
        lambda *a: alone(gpu, a[0], "bwd", a[1]),
    ):
        assert price(pair(2048, r=8), 2) <= price(pair(2048, r=64), 2)
        assert price(pair(2048), 2) < price(pair(2048), 4)


def test_conversions_are_kernels_too():
    assert pair_kernels("fwd", converts=True) > pair_kernels("fwd", converts=False)
    assert pair_kernels("bwd", converts=False) > pair_kernels("fwd", converts=False)


def test_tasks_without_tokens_cost_nothing():
    gpu = load_gpu("a100")
    assert grouped(gpu, [], "fwd") == 0.0
    assert grouped(gpu, [pair(0)], "bwd") == 0.0
    assert grouped(gpu, [pair(0), pair(512)], "fwd") == grouped(gpu, [pair(512)], "fwd")


@pytest.mark.parametrize("device", DEVICES)
def test_one_number_takes_as_long_as_in_an_array(device):
    gpu = load_gpu(device)
    for bytes_ in (0, 1000, 10**6, 6 * 10**6, 3 * 10**7, 5 * 10**7, 10**8, 10**10):
        assert moved_seconds(gpu, bytes_) == pytest.approx(gpu.stream_s(bytes_, launches=0), rel=1e-12)
