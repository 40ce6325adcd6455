"""Whole sessions with real processes: a small real profile, refusals, failures, interruption."""

import os
import signal
import subprocess
import sys
import time

import pytest

import profiler.session
from muxtune.costs import ProfiledCosts, load_profile
from muxtune.errors import RunError, SpecError, UserError
from muxtune.model import PRESETS
from muxtune.operators import OPERATOR_DIMS
from profiler import profile_model

SMALL = PRESETS["llama-tiny"].model_copy(
    update={
        "name": "llama-mini",
        "layers": 2,
        "hidden": 64,
        "ffn": 128,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "max_positions": 128,
    }
)


def test_unknown_devices_are_refused():
    with pytest.raises(UserError, match="no device named 'tpu'; did you mean 'cpu'"):
        profile_model(SMALL, device="tpu")


def test_an_absent_gpu_is_refused():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(UserError, match="expected a CUDA device"):
        profile_model(SMALL, device="cuda")


@pytest.mark.parametrize("ranks", [0, -1, 65])
def test_a_senseless_number_of_ranks_is_refused(ranks):
    with pytest.raises(SpecError, match=f"ranks = {ranks}: expected 1 to 64"):
        profile_model(SMALL, ranks=ranks)


def test_a_place_that_cannot_be_written_is_refused_before_measuring(tmp_path):
    with pytest.raises(UserError, match="expected a file, not a directory"):
        profile_model(SMALL, out=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the profile"):
        profile_model(SMALL, out=tmp_path / "file" / "p.parquet")


@pytest.mark.slow
@pytest.mark.integration
def test_a_real_profile_prices_its_own_stages(tmp_path):
    out = tmp_path / "new" / "p.parquet"
    profile = profile_model(SMALL, out=out, ranks=1, quick=True)
    assert load_profile(out) == profile
    assert [path.name for path in out.parent.iterdir()] == ["p.parquet"]
    assert {m.op.kind for m in profile.measurements} == set(OPERATOR_DIMS)
    for m in profile.measurements:
        assert 1e-7 < m.p10_s <= m.median_s <= m.p90_s
        assert m.repetitions >= 5
    assert (profile.provenance.ranks, profile.provenance.threads) == (1, 1)
    costs = ProfiledCosts(profile, SMALL)
    # Wide: a machine that does other things at the same time; that the pieces fit together is the point.
    for stage in costs.stages:
        assert costs.overhead(stage.phase).stage_s(stage) == pytest.approx(stage.measured_s, rel=0.6)


@pytest.mark.integration
def test_a_failing_process_is_reported_with_its_last_words(monkeypatch, tmp_path):
    monkeypatch.setattr(profiler.session, "_SUITE", "toch")
    with pytest.raises(RunError, match=r"profiling failed on rank 0: .*no operator suite named 'toch'"):
        profile_model(SMALL, out=tmp_path / "p.parquet", ranks=1, quick=True)
    assert list(tmp_path.iterdir()) == []


_INTERRUPTED = """
import signal, sys
from pathlib import Path
from muxtune.model import PRESETS
from profiler import profile_model
# A shell's background jobs inherit that it is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
profile_model(PRESETS["llama-tiny"], out=Path(sys.argv[1]), ranks=2)
"""


def _workers_of(folder):
    """Measuring processes whose temporary directory lies in ``folder``."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    command = file.read().decode(errors="replace").split("\0")
            except OSError:
                continue  # ended meanwhile
            if "profiler.worker" in command and any(part.startswith(str(folder)) for part in command):
                found.append(int(entry))
    return found


def _until(condition, deadline_s):
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


@pytest.mark.integration
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc to find the processes")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interruption_leaves_neither_file_nor_process(tmp_path, how):
    out, temporary = tmp_path / "out" / "p.parquet", tmp_path / "tmp"
    temporary.mkdir()
    session = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED, str(out)],
        env=os.environ | {"TMPDIR": str(temporary)},
        stderr=subprocess.DEVNULL,
    )
    try:
        _until(lambda: len(_workers_of(temporary)) == 2, 60)
        time.sleep(4.0)  # torch is loaded and the measurement under way, on most machines
        session.send_signal(how)
        session.wait(30)
        _until(lambda: not _workers_of(temporary), 60)
    finally:
        session.kill()
        session.wait()
    assert not out.exists()
    if how == signal.SIGINT:
        assert list(temporary.iterdir()) == []
