"""What a run is asked to do, what each of its ranks is told, and the exit codes that a rank answers with."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from muxtune.cluster import DeviceKind

PEER_LOST_EXIT_CODE = 75
"""Exit code of a rank whose neighbour died; the neighbour has the real cause."""

USER_ERROR_EXIT_CODE = 2
"""Exit code of a rank that met a mistake that the user can mend."""

CHECKPOINT_EVERY = 10
"""Iterations between checkpoints unless told otherwise."""

PEER_TIMEOUT_S = 1800.0
"""How long a rank waits for another one's message; the first wait may last as long as loading a backbone."""

PEER_TIMEOUTS_S = (0.001, 7 * 86400.0)
"""The shortest and the longest; torch counts milliseconds, and not for months."""


class RunOptions(BaseModel):
    """What may be asked of a run beside its plan and its folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = None
    """Iterations of the whole run; None until the longest task has done its steps."""
    resume: bool = False
    """Continue the run in the folder from its newest checkpoint; start it if there is none."""
    checkpoint_every: int = CHECKPOINT_EVERY
    """Iterations between checkpoints."""
    metered_steps: int = 1
    """First steps of each hTask in which the bytes of every micro-batch are counted, which that slows by a
    few percent; later ones are taken to be alike."""
    peer_timeout_s: float = PEER_TIMEOUT_S
    """A rank that keeps another one waiting for longer is taken to hang."""
    device: DeviceKind | None = None
    """What to compute on, instead of what the plan is for: results are the same but for rounding, times are
    not what the plan predicts."""
    strict: bool = False
    """A task that fails ends the run; else the others go on."""
    progress: bool = False
    """Show the tasks and a bar on stderr (not under torchrun)."""
    json_lines: Path | None = None
    """File that gets what is shown as a JSON object a line, at most one every two seconds (not under
    torchrun)."""


class RunJob(RunOptions):
    """Options of a run that have been checked, and what else its ranks have to know.

    The plan lies in the run's folder.
    """

    out_dir: Path
    steps: int
    """Iterations of the whole run."""
    first_step: int
    """Iterations that a checkpoint stands for; 0 for a fresh start."""
    device: DeviceKind = "cpu"
    """Kind of device that all ranks compute on."""
    lock: int | None = None
    """Descriptor of the lock on ``out_dir``; ranks that are started on this machine inherit it."""

    @classmethod
    def of(
        cls,
        options: RunOptions,
        out_dir: Path,
        *,
        steps: int,
        first_step: int,
        device: DeviceKind,
        lock: int | None = None,
    ) -> Self:
        """The job of ranks that are started with these options.

        Args:
            options: Options that have been checked.
            out_dir: Folder of the run.
            steps: Iterations of the whole run.
            first_step: Iterations that are done.
            device: Kind of device, if the options name none.
            lock: Descriptor of the lock on the folder.
        """
        decided = {"out_dir": out_dir.resolve(), "steps": steps, "first_step": first_step, "lock": lock}
        return cls(**options.model_dump() | decided | {"device": options.device or device})
