"""What a process says of its own memory."""

from __future__ import annotations

import mmap
import subprocess
import sys

import numpy as np
import pytest

import runtime.device.process_memory
from runtime.device.process_memory import process_bytes, process_peak_bytes

BYTES = 256 * 2**20


def test_the_peak_stays_when_memory_is_given_back():
    before, peak_before = process_bytes(), process_peak_bytes()
    held = mmap.mmap(-1, BYTES)  # new pages; an array may get some that the process has kept
    np.frombuffer(held, dtype=np.uint8)[:] = 1
    assert process_bytes() >= before + 0.95 * BYTES
    held.close()
    assert process_bytes() < before + 0.5 * BYTES
    assert process_peak_bytes() >= max(peak_before, before + 0.95 * BYTES)


def test_a_process_does_not_inherit_the_peak_of_its_parent():
    code = "from runtime.device.process_memory import process_peak_bytes as f; print(f())"
    held = np.ones(BYTES, dtype=np.uint8)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < BYTES <= held.nbytes


def test_other_systems_tell_the_peak_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime.device.process_memory, "_STATUS", tmp_path / "status")
    assert process_peak_bytes() == pytest.approx(process_bytes(), rel=0.01)
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    assert (process_peak_bytes(), process_bytes()) == (2 * 2**20, 2**20)
