"""What a tenant asks for: tasks, read from a workload file (YAML)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from muxtune.model import Dtype, ModelSpec
from muxtune.peft import AnyPeft, check_peft, extra
from muxtune.peft.spec import LARGEST_FACTOR
from muxtune.support.errors import SpecError, spec_error_from
from muxtune.support.strict_models import StrictModel
from muxtune.support.user_files import expand_user
from muxtune.support.yaml_file import load_yaml

MOST_ID_CHARACTERS = 128
"""Characters of a task's id, at most: it names folders and files, with more around it."""
MOST_STEPS = 10_000_000
MOST_BATCH_SEQUENCES = 10_000_000
"""Sequences of a batch, at most."""

MOST_MICROBATCHES = 4096
"""Micro-batches of a task's step: a schedule has each of them on each stage."""
MOST_SEQUENCES = 4096
"""Sequences of a task in a micro-batch."""
MOST_SHUFFLED = 1 << 21
"""Sequences of all steps of a task with ``shuffle``: a plan looks at the batch of each step."""

BosRule = Literal["auto", "always", "never"]
"""Whether BOS stands before a sequence; ``auto``: where the tokenizer itself puts one."""


class DatasetSpec(StrictModel):
    """Where the examples come from: a JSONL file, or only a distribution of lengths."""

    path: Path | None = None
    """JSONL with ``{"prompt", "completion"}`` or ``{"text"}`` lines; relative to the workload file."""
    lengths: str | None = None
    """Name of a shipped length histogram; the tokens are then drawn at random from the task's seed."""
    sha256: str | None = None
    """Digest of the file when the plan was made; a changed file is refused."""
    bos: BosRule = "auto"
    """Whether BOS stands before each text; one that a text begins with counts."""
    allow_special: bool = True
    """Whether control tokens that are written in a text (``</s>``) are those tokens, or plain characters."""

    @model_validator(mode="after")
    def _exactly_one(self) -> DatasetSpec:
        if (self.path is None) == (self.lengths is None):
            raise ValueError("expected exactly one of path and lengths")
        if self.path is None and (self.bos != "auto" or not self.allow_special):
            raise ValueError("expected bos and allow_special beside path alone: drawn tokens have no text")
        return self


class PeftTask(StrictModel):
    """One tenant's fine-tuning job."""

    id: str = Field(max_length=MOST_ID_CHARACTERS, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the task, also of its folder in a run."""
    peft: AnyPeft
    """What is trained beside the frozen backbone."""
    dataset: DatasetSpec
    """Its examples."""
    global_batch_size: int = Field(gt=0, le=MOST_BATCH_SEQUENCES)
    """Sequences per optimizer step."""
    micro_batch_size: int = Field(gt=0)
    """Sequences of this task per micro-batch, at most."""
    max_length: int = Field(gt=1)
    """Tokens per sequence, at most; longer prompts lose their left end."""
    learning_rate: float = Field(gt=0, le=LARGEST_FACTOR)
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Steps over which the learning rate rises from 0."""
    steps: int = Field(gt=0, le=MOST_STEPS)
    """Optimizer steps."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the adapter's first values, dropout, shuffling and drawn lengths."""
    shuffle: bool = False
    """Whether each epoch takes the examples in an order of its own, torch's for the seed."""
    weight_decay: float = Field(default=0.0, ge=0, le=LARGEST_FACTOR)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the task's gradient, to which larger ones are clipped; null for no clipping."""
    abort_grad_norm: float | None = Field(default=None, gt=0)
    """Norm of the task's gradient, before it is clipped, above which the task fails; null where any will do
    that the optimizer can hold."""

    @property
    def row_tokens(self) -> int:
        """Rows of a stream that a sequence takes at most: virtual tokens of its method, then its own."""
        return extra(self.peft).rows + self.max_length

    @property
    def declared_microbatches(self) -> int:
        """Micro-batches per optimizer step when the task runs alone."""
        return self.global_batch_size // self.micro_batch_size

    def with_digests(self, *, dataset: str | None, init: str | None) -> PeftTask:
        """The task with the digests of its dataset and of the saved adapter that it starts from."""
        changes: dict[str, object] = {}
        if dataset is not None:
            changes["dataset"] = self.dataset.model_copy(update={"sha256": dataset})
        if init is not None:
            changes["peft"] = self.peft.model_copy(update={"init_sha256": init})
        return self.model_copy(update=changes) if changes else self

    def check(self, model: ModelSpec) -> None:
        """Refuse what cannot run on this backbone.

        Raises:
            SpecError: Names the field, the value and what was expected.
        """
        where = f"tasks.{self.id}"
        if self.global_batch_size % self.micro_batch_size:
            expected = f"a divisor of global_batch_size ({self.global_batch_size})"
            raise SpecError(f"{where}.micro_batch_size", self.micro_batch_size, expected)
        if self.declared_microbatches > MOST_MICROBATCHES:
            least = -(-self.global_batch_size // MOST_MICROBATCHES)
            expected = f"at least {least}: a step of at most {MOST_MICROBATCHES} micro-batches"
            raise SpecError(f"{where}.micro_batch_size", self.micro_batch_size, expected)
        if self.micro_batch_size > MOST_SEQUENCES:
            expected = f"at most {MOST_SEQUENCES} sequences in a micro-batch"
            raise SpecError(f"{where}.micro_batch_size", self.micro_batch_size, expected)
        if self.shuffle and self.steps * self.global_batch_size > MOST_SHUFFLED:
            most = MOST_SHUFFLED // self.global_batch_size
            expected = f"at most {most} with shuffle and global_batch_size {self.global_batch_size}"
            raise SpecError(f"{where}.steps", self.steps, f"{expected}: no two steps are alike")
        in_front = extra(self.peft)
        positions = in_front.rows + in_front.keys
        if positions + self.max_length > model.max_positions:
            expected = f"at most {model.max_positions - positions}, the position limit of {model.name}"
            expected += f" behind {positions} virtual tokens" if positions else ""
            raise SpecError(f"{where}.max_length", self.max_length, expected)
        check_peft(self.peft, model, f"{where}.peft")


class Workload(StrictModel):
    """Tasks that share one backbone."""

    backbone: str | None = None
    """Preset or directory; ``--model`` overrides it."""
    dtype: Dtype | None = None
    """Type of weights and activations; if absent, a preset's own, and float32 for a directory."""
    tasks: tuple[PeftTask, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique_ids(self) -> Workload:
        seen: set[str] = set()
        for task in self.tasks:
            if task.id in seen:
                raise ValueError(f"expected unique task ids; {task.id!r} stands twice")
            seen.add(task.id)
        return self

    def check(self, model: ModelSpec) -> None:
        """Refuse tasks that cannot run on this backbone (``SpecError``)."""
        for task in self.tasks:
            task.check(model)


def load_workload(path: Path) -> Workload:
    """Read a workload file; paths in it become absolute.

    Raises:
        UserError: The file is missing, not YAML, or a field is wrong; the message names it.
    """
    content = load_yaml(path, "the workload")
    if not isinstance(content, dict):
        raise SpecError(str(path), content, "a mapping with the key tasks")
    return workload_from(content, str(path), path.resolve().parent)


def workload_from(content: dict[str, object], where: str, folder: Path) -> Workload:
    """Validate a workload given as plain data; relative paths are taken from ``folder``."""
    try:
        workload = Workload.model_validate(content)
    except ValidationError as error:
        raise spec_error_from(error, where) from error
    return workload.model_copy(
        update={"tasks": tuple(_with_absolute_paths(task, folder) for task in workload.tasks)}
    )


def _with_absolute_paths(task: PeftTask, folder: Path) -> PeftTask:
    where = f"tasks.{task.id}"
    if task.peft.init is not None:
        whole = folder / expand_user(task.peft.init, f"{where}.peft.init")
        task = task.model_copy(update={"peft": task.peft.model_copy(update={"init": whole.resolve()})})
    path = task.dataset.path
    if path is None:
        return task
    whole = folder / expand_user(path, f"{where}.dataset.path")
    dataset = task.dataset.model_copy(update={"path": whole.resolve()})
    return task.model_copy(update={"dataset": dataset})
