"""Element-wise kernels: shipped coefficients against the measurements, and physics that any device obeys."""

from pathlib import Path

import numpy as np
import pytest

from muxtune.costs.devices import device_names
from muxtune.costs.pointwise import POINTWISE, load_pointwise, pointwise_seconds, stream_seconds
from muxtune.support.errors import UserError

DEVICES = ("a100", "a40", "h100")
DATA_SHEET_BYTES_PER_S = {"a40": 696e9, "a100": 2039e9, "h100": 3350e9}
TABLE = Path(__file__).parents[4] / "shared/data/gpu_measurements/pointwise.parquet"
TOKENS = np.array([1, 16, 128, 256, 1024, 4096, 8192])


@pytest.mark.parametrize("device", DEVICES)
def test_measured_operators_of_more_than_128_tokens_are_within_12_percent(device):
    if not TABLE.exists():
        pytest.skip(f"the measurements {TABLE} are not there")
    from profiler.fitting.pointwise import errors, load_rows

    reported = errors(load_pointwise(device), load_rows(TABLE, device))
    assert len(reported) > 10_000
    assert reported["error"].mean() <= 0.08
    by_operator = reported.groupby("op")["error"].mean()
    assert len(by_operator) == 6
    assert by_operator.max() <= 0.12
    assert abs(reported["error"].mean() - load_pointwise(device).fit.error) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_coefficients_are_physical_and_say_where_they_come_from(device):
    c = load_pointwise(device)
    assert 0.75 < c.dram_bytes_per_s / DATA_SHEET_BYTES_PER_S[device] <= 1.0
    assert c.l2_bytes_per_s > c.dram_bytes_per_s
    assert 2e-7 < c.launch_s < 3e-6
    assert c.fit.rows > 10_000
    assert "profiler.fitting pointwise" in c.fit.command
    assert max(c.fit.held_out.values()) <= 0.12


def test_these_devices_ship():
    assert set(DEVICES) <= set(device_names())
    with pytest.raises(UserError, match="did you mean 'a100'"):
        load_pointwise("a1000")


@pytest.mark.parametrize("phase", ["fwd", "bwd"])
@pytest.mark.parametrize("kind", POINTWISE)
@pytest.mark.parametrize("device", DEVICES)
def test_more_tokens_never_take_less_and_many_take_a_time_in_proportion(device, kind, phase):
    c = load_pointwise(device)
    seconds = pointwise_seconds(c, kind, TOKENS, 4096, phase=phase)
    assert (np.diff(seconds) >= 0).all()
    assert seconds[0] >= c.launch_s
    once, twice = pointwise_seconds(c, kind, np.array([65536, 131072]), 4096, phase=phase)
    assert twice / once == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("kind", POINTWISE)
def test_no_kernel_beats_the_memory(kind):
    c = load_pointwise("a100")
    bytes_ = 2 * POINTWISE[kind].streams * TOKENS * 8192
    assert (pointwise_seconds(c, kind, TOKENS, 8192) >= bytes_ / c.l2_bytes_per_s).all()


def test_twice_the_cache_finds_nothing_in_it():
    c = load_pointwise("a40")
    assert stream_seconds(c, c.l2_bytes, launches=0) == pytest.approx(c.l2_bytes / c.l2_bytes_per_s)
    assert stream_seconds(c, 2 * c.l2_bytes, launches=0) == pytest.approx(2 * c.l2_bytes / c.dram_bytes_per_s)
    assert stream_seconds(c, 0, launches=3) == pytest.approx(3 * c.launch_s)


def test_blocks_of_rows_run_in_waves():
    c = load_pointwise("a40")
    one_wave = c.sm_count * (c.threads_per_sm // 1024)
    below, full, above = pointwise_seconds(c, "rms_norm", [one_wave // 2, one_wave, one_wave + 1], 8192)
    assert full / below < 1.1
    assert above / full > 1.5


def test_the_backward_moves_more():
    c = load_pointwise("h100")
    forward = pointwise_seconds(c, "silu_gate", 8192, 11008)
    backward = pointwise_seconds(c, "silu_gate", 8192, 11008, phase="bwd")
    assert backward / forward == pytest.approx(5 / 3, rel=0.01)


def test_shapes_broadcast():
    c = load_pointwise("a100")
    grid = pointwise_seconds(c, "add", TOKENS[:, None], np.array([2560, 4096]))
    assert grid.shape == (len(TOKENS), 2)
    assert grid[3, 1] == pointwise_seconds(c, "add", TOKENS[3], 4096)
