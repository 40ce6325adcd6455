"""A device whose clock moves when it is told to, and which counts what it is asked for."""

from muxtune.costs.profile import ClockReading
from profiler.devices import Description, Device
from profiler.timing import CpuTimer, WallTimer


class CountingTimer(CpuTimer):
    def __init__(self, clock):
        super().__init__(clock, clock)
        self.calls = 0

    def call_s(self, function):
        self.calls += 1
        return super().call_s(function)


class FakeDevice(Device):
    """Keeps to the interface alone: neither a CPU nor a GPU."""

    backend = "gloo"
    shared_by_ranks = True
    group_per_direction = False
    name = "cpu"  # where torch puts the tensors

    def __init__(self, rank=0, *, copies=1):
        super().__init__(rank)
        self.now_s = 0.0
        self.timer = CountingTimer(lambda: self.now_s)
        self.link_timer = WallTimer(lambda: self.now_s)
        self.asked_bytes = []
        self._copies = copies

    @classmethod
    def count(cls):
        return 2

    def copies(self, bytes_):
        self.asked_bytes.append(bytes_)
        return self._copies

    def processor_s(self):
        return self.now_s

    def describe(self):
        return Description(processor="a fake", versions={"fakelib": "1"}, settings={"mode": "fast"})

    def read_clocks(self, moment):
        return ClockReading(rank=self.rank, moment=moment, mhz={"core": 1000.0})


class CountingSuite:
    """Forward takes 2 ms of the device's time, backward 4 ms."""

    def __init__(self, device):
        self.device = device
        self.built = []
        self.forwards = 0
        self.order = ""

    def build(self, op, model, device, *, needs_backward=True):
        self.built.append((op, device))

        def forward():
            self.forwards += 1
            self.order += "F"
            self.device.now_s += 2e-3

        def backward():
            assert self.forwards >= len(self.built), "a backward needs its forward before it"
            self.order += "B"
            self.device.now_s += 4e-3

        return forward, backward if needs_backward else None


def play_nvidia_smi(folder, monkeypatch, answer, *, code=0, seconds=0.0):
    """Put a script of that name first on the path; returns what tells the arguments of its calls."""
    script, log = folder / "nvidia-smi", folder / "nvidia-smi.log"
    script.write_text(f"#!/bin/sh\necho \"$@\" >> {log}\nsleep {seconds}\necho '{answer}'\nexit {code}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return lambda: log.read_text().splitlines()
