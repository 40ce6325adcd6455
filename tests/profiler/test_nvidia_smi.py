"""Questions to the driver, with a script that plays it."""

import pytest

from profiler.nvidia_smi import query_gpu, throttle_reasons
from tests.profiler.fakes import play_nvidia_smi

FIELDS = ["driver_version", "power.limit", "clocks.sm"]


def test_values_come_by_field(tmp_path, monkeypatch):
    calls = play_nvidia_smi(tmp_path, monkeypatch, "550.54.15, 400.00, 1410")
    assert query_gpu("GPU-12", FIELDS) == {
        "driver_version": "550.54.15",
        "power.limit": "400.00",
        "clocks.sm": "1410",
    }
    (call,) = calls()
    assert call == (
        "--id=GPU-12 --query-gpu=driver_version,power.limit,clocks.sm --format=csv,noheader,nounits"
    )


@pytest.mark.parametrize("absent", ["[N/A]", "[Not Supported]", "N/A"])
def test_what_the_gpu_does_not_have_is_left_out(tmp_path, monkeypatch, absent):
    play_nvidia_smi(tmp_path, monkeypatch, f"550.54.15, {absent}, 1410")
    assert set(query_gpu("GPU-12", FIELDS)) == {"driver_version", "clocks.sm"}


def test_the_device_works_meanwhile(tmp_path, monkeypatch):
    play_nvidia_smi(tmp_path, monkeypatch, "1, 2, 3", seconds=0.3)
    rounds = []
    query_gpu("GPU-12", FIELDS, lambda: rounds.append(1))
    assert len(rounds) > 1


def test_no_driver_no_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert query_gpu("GPU-12", FIELDS) == {}


@pytest.mark.parametrize(("answer", "code"), [("", 0), ("No devices were found", 6), ("1, 2, 3", 9)])
def test_a_failing_driver_gives_no_answers(tmp_path, monkeypatch, answer, code):
    play_nvidia_smi(tmp_path, monkeypatch, answer, code=code)
    assert query_gpu("GPU-12", FIELDS) == {}


@pytest.mark.parametrize(
    ("mask", "reasons"),
    [
        ("0x0000000000000000", ()),
        ("0x0000000000000001", ()),  # idle
        ("0x0000000000000002", ()),  # clocks were set
        ("0x0000000000000044", ("power cap", "hardware thermal slowdown")),
    ],
)
def test_only_reasons_that_mean_throttling_count(mask, reasons):
    assert throttle_reasons(mask) == reasons
