"""Prompt tuning (arXiv 2104.08691): trained embeddings of virtual tokens in front of every sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field

from muxtune.model import ModelSpec
from muxtune.operators import OperatorKind, OperatorShape, OperatorWork, Phase
from muxtune.operators.kinds import looked_up
from muxtune.peft.method import METHODS
from muxtune.peft.representation import Attachment, Extra, TrainedTensor
from muxtune.peft.sites import EMBEDDING, embedding_site
from muxtune.peft.spec import MOST_VIRTUAL_TOKENS, PeftSpec
from muxtune.peft.start import check_said


class PromptTuningSpec(PeftSpec):
    """Embeddings of virtual tokens in front of every sequence (arXiv 2104.08691)."""

    method: Literal["prompt_tuning"]
    """The PEFT method."""
    num_virtual_tokens: int = Field(gt=0, le=MOST_VIRTUAL_TOKENS)
    """Virtual tokens, which go through the backbone as others do."""
    prompt_tuning_init: Literal["RANDOM"] = "RANDOM"
    """How they start: drawn under the task's seed."""


def _work(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """The task's embedded tokens with the virtual ones in their places; backward: these rows' gradients.

    What virtual tokens cost in the layers is what any token costs: they are rows of the stream.
    """
    features, rows, tokens = dims
    if not tokens:
        return OperatorWork(0.0, 0.0, 0.0)
    moved = features * (4 * tokens + rows) if phase == "fwd" else features * (3 * tokens + 2 * rows)
    return OperatorWork(0.0, float(model.dtype_bytes * moved), 6)


def _grid(model: ModelSpec, quick: bool) -> Iterable[tuple[int, ...]]:
    """Usual numbers of virtual tokens."""
    for rows in (8, 128) if quick else (4, 16, 64, 256):
        for tokens in (16, 256, 4096) if quick else (16, 64, 256, 1024, 4096):
            yield model.hidden, rows, tokens


_KEPT_BYTES = 9
"""Per token of the task: its place among the virtual ones, and whether it is one of them."""


_SILENT = frozenset(
    "auto_mapping base_model_name_or_path inference_mode peft_version revision runtime_config task_type "
    "num_attention_heads num_layers num_transformer_submodules token_dim "
    "prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path"
    " tokenizer_kwargs".split()
)
"""Keys of peft's configuration that say how a saved adapter began, or that its tensor shows."""


@METHODS.register("prompt_tuning")
class PromptTuning:
    """The method."""

    summary = "trained embeddings of virtual tokens in front of every sequence (prompt tuning)"
    spec = PromptTuningSpec
    kinds: Mapping[str, OperatorKind] = {
        "prompt": OperatorKind(
            dims=("features", "rows", "tokens"),
            work=_work,
            grid=_grid,
            split=looked_up(1),
            samples=((4096, 16, 512),),
        )
    }

    def check(self, spec: PromptTuningSpec, model: ModelSpec, where: str) -> None:
        """Nothing to refuse: that all rows have positions is checked with the task."""

    def attachments(self, spec: PromptTuningSpec, model: ModelSpec, layer: int) -> tuple[Attachment, ...]:
        """The embeddings, on the first stage."""
        return _prompt(spec.num_virtual_tokens, model) if layer == EMBEDDING else ()

    def check_start(
        self, spec: PromptTuningSpec, model: ModelSpec, config: Mapping[str, Any], where: str
    ) -> None:
        """Refuse an adapter of another method; that it has the task's tensor is seen when it is loaded."""
        assert spec.init is not None, "asked only then"
        said = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": spec.num_virtual_tokens}
        check_said(config, said, _SILENT, spec.init, where)

    def extra(self, spec: PromptTuningSpec) -> Extra:
        """Its rows."""
        return Extra(rows=spec.num_virtual_tokens)


@lru_cache(maxsize=1024)
def _prompt(rows: int, model: ModelSpec) -> tuple[Attachment, ...]:
    return (
        Attachment(
            site=embedding_site(model),
            reads="nothing",
            joins="extend",
            tensors=(TrainedTensor("prompt_embeddings", (rows, model.hidden)),),
            adapter=OperatorShape("prompt", (model.hidden, rows)),
            kept_bytes=_KEPT_BYTES,
        ),
    )
