"""The GPU model of matrix products: physical shape, shipped coefficients, and speed."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.costs.gemm import candidate_kernels, gemm_seconds, load_gemm
from muxtune.support.errors import SpecError, UserError

DEVICES = ("a40", "a100", "h100")
sizes = st.integers(1, 1_000_000)
devices = st.sampled_from(DEVICES)
axes = st.sampled_from((0, 1, 2))


def kernel_seconds(device, shape):
    return candidate_kernels(load_gemm(device), *(np.array([[float(size)]]) for size in shape)).seconds[0]


@given(devices, sizes, sizes, sizes)
def test_any_shape_has_a_cost_between_physical_bounds(device, m, n, k):
    c = load_gemm(device)
    seconds = float(gemm_seconds(c, m, n, k))
    assert np.isfinite(seconds)
    compute_s, memory_s = 2 * m * n * k / c.flops_per_s, 2 * (m * k + n * k + m * n) / c.bytes_per_s
    assert seconds >= c.launch_s + max(compute_s, memory_s) * (1 - 1e-12)


@given(devices, sizes, sizes, sizes, axes, st.integers(1, 1000))
def test_no_kernel_gets_faster_when_a_dimension_grows(device, m, n, k, axis, more):
    larger = [m, n, k]
    larger[axis] += more
    assert (kernel_seconds(device, larger) >= kernel_seconds(device, (m, n, k)) * (1 - 1e-12)).all()


@given(devices, st.integers(1, 16384), st.integers(64, 65536), st.integers(64, 65536), axes)
def test_four_times_a_dimension_takes_longer(device, m, n, k, axis):
    """Of the mixture over kernels; a smaller step may reach a better kernel, as it does on real devices."""
    larger = [m, n, k]
    larger[axis] *= 4
    assert gemm_seconds(load_gemm(device), *larger) > 0.99 * gemm_seconds(load_gemm(device), m, n, k)


def test_a_row_more_than_a_wave_of_tiles_costs_a_wave():
    c = load_gemm("a40").model_copy(
        update={
            "tiles": ((128, 128),),
            "tile_reluctance": (0.0,),
            "splits": (1,),
            "resident_blocks": 1,
            "bytes_per_s": 1e15,  # so that nothing but compute counts
            "l2_bytes_per_s": 1e16,
        }
    )
    n = 128 * c.sm_count  # a row of tiles fills the device
    one, still_one, two = gemm_seconds(c, [1, 128, 129], n, 8192)
    assert still_one == pytest.approx(one, rel=0.1)  # only operands grow
    assert two == pytest.approx(2 * one, rel=0.2)


def test_split_k_pays_where_tiles_leave_the_device_idle():
    c = load_gemm("a40")
    alone = c.model_copy(update={"splits": (1,)})
    assert gemm_seconds(c, 64, 256, 16384) < 0.7 * gemm_seconds(alone, 64, 256, 16384)
    assert gemm_seconds(c, 4096, 8192, 8192) == pytest.approx(gemm_seconds(alone, 4096, 8192, 8192), rel=0.05)


def test_a_reluctant_library_takes_other_tiles():
    c = load_gemm("h100")
    shunned = c.model_copy(
        update={"tile_reluctance": tuple(100.0 if tile != (64, 64) else 0.0 for tile in c.tiles)}
    )
    only = c.model_copy(update={"tiles": ((64, 64),), "tile_reluctance": (0.0,)})
    assert gemm_seconds(shunned, 2048, 4096, 4096) == pytest.approx(gemm_seconds(only, 2048, 4096, 4096))
    assert gemm_seconds(shunned, 2048, 4096, 4096) > 1.2 * gemm_seconds(c, 2048, 4096, 4096)


@pytest.mark.parametrize("device", DEVICES)
def test_shipped_coefficients_name_their_origin_and_are_near_the_data_sheet(device):
    c = load_gemm(device)
    sheet = {"a40": (149.7e12, 696e9), "a100": (312e12, 2039e9), "h100": (989e12, 3350e9)}[device]
    # Of the rates, a kernel reaches what overheads, L2 traffic and throttling leave.
    assert 0.8 < c.flops_per_s / sheet[0] < 1.2
    assert 0.7 < c.bytes_per_s / sheet[1] < 1.1
    assert c.device == device
    assert "Vidur" in c.fit.source
    assert c.fit.rows > 10_000
    assert c.fit.error < 0.07
    assert len(c.fit.held_out) >= 4


@pytest.mark.parametrize("device", DEVICES)
def test_large_products_run_at_rates_that_such_devices_reach(device):
    m, n, k = 4096, 8192, 8192
    rate = 2 * m * n * k / float(gemm_seconds(load_gemm(device), m, n, k))
    low, high = {"a40": (95e12, 130e12), "a100": (200e12, 260e12), "h100": (600e12, 800e12)}[device]
    assert low < rate < high


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pair", [(4096, 4096), (22016, 4096), (8192, 28672), (5120, 13824)], ids=str)
def test_rates_stay_level_beyond_the_table(device, pair):
    """It ends at 4096 or 8192 rows, where the longest products still reach what shorter ones do."""
    m = np.array([4096, 8192, 16384, 65536])
    rates = m / gemm_seconds(load_gemm(device), m, *pair)
    np.testing.assert_allclose(rates, rates[0], rtol=0.06)


def test_a_power_limit_bounds_long_products_and_spares_short_ones():
    c = load_gemm("h100")
    limited = c.model_copy(update={"sustained_flops_per_s": 300e12})
    m, n, k = 16384, 8192, 8192
    assert gemm_seconds(limited, m, n, k) == pytest.approx(2 * m * n * k / 300e12, rel=0.02)
    assert gemm_seconds(limited, 64, 4096, 4096) == gemm_seconds(c, 64, 4096, 4096)


def test_arrays_broadcast_and_keep_their_shape():
    c = load_gemm("a100")
    grid = gemm_seconds(c, np.array([[1], [100]]), np.array([4096, 8192, 4096]), 4096)
    assert grid.shape == (2, 3)
    assert grid[1, 2] == grid[1, 0] == gemm_seconds(c, 100, 4096, 4096)
    assert gemm_seconds(c, [], [], []).shape == (0,)


def test_sizes_without_meaning_are_refused():
    with pytest.raises(SpecError, match=r"\(m, n, k\) = \(0.0, 8.0, 8.0\): expected numbers above 0"):
        gemm_seconds(load_gemm("a40"), [16, 0], 8, 8)
    with pytest.raises(UserError, match="no device named 'a41'; did you mean 'a40'"):
        load_gemm("a41")


def test_a_hundred_thousand_distinct_shapes_take_seconds():
    generator = np.random.default_rng(0)
    m, n, k = (generator.integers(1, 30_000, 100_000) for _ in range(3))
    start = time.process_time()
    gemm_seconds(load_gemm("a40"), m, n, k)
    assert time.process_time() - start < 4  # half a second of one core, whatever else the machine does
