"""What a rank is asked to do, and the exit codes that it answers with."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from runtime.device.devices import DeviceKind

PEER_LOST_EXIT_CODE = 75
"""Exit code of a rank whose neighbour died; the neighbour has the real cause."""

USER_ERROR_EXIT_CODE = 2
"""Exit code of a rank that met a mistake that the user can mend."""

PEER_TIMEOUT_S = 1800.0
"""How long a rank waits for another one's message; the first wait may last as long as loading a backbone."""

PEER_TIMEOUTS_S = (0.001, 7 * 86400.0)
"""The shortest and the longest; torch counts milliseconds, and not for months."""


class RunJob(BaseModel):
    """What a rank has to know beside the plan, which lies in the run's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    out_dir: Path
    steps: int
    """Iterations of the whole run."""
    first_step: int
    """Iterations that a checkpoint stands for; 0 for a fresh start."""
    checkpoint_every: int
    metered_steps: int = 1
    """First steps of each hTask in which the bytes of every micro-batch are counted."""
    device: DeviceKind = "cpu"
    """Kind of device that all ranks compute on."""
    peer_timeout_s: float = PEER_TIMEOUT_S
    """A rank that keeps another one waiting for longer is taken to hang."""
    lock: int | None = None
    """Descriptor of the lock on ``out_dir``; ranks that are started on this machine inherit it."""
