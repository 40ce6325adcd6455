"""Prefix tuning (arXiv 2101.00190): trained keys and values in front of every sequence, in every layer."""

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
from muxtune.peft.sites import EMBEDDING, site_of
from muxtune.peft.spec import MOST_VIRTUAL_TOKENS, PeftSpec
from muxtune.peft.start import check_said
from muxtune.support.errors import SpecError


class PrefixTuningSpec(PeftSpec):
    """Keys and values of virtual tokens in front of every sequence (arXiv 2101.00190)."""

    method: Literal["prefix_tuning"]
    """The PEFT method."""
    num_virtual_tokens: int = Field(gt=0, le=MOST_VIRTUAL_TOKENS)
    """Keys, and as many values, in each layer."""
    prefix_projection: bool = False
    """Whether a network computes them; only without it is the prefix itself trained."""


def _work(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """The prefix beside the keys of a micro-batch; backward: its gradient, added to those so far.

    What the tokens' attention to it costs is part of ``carried_attention``.
    """
    features, keys, tokens = dims
    if not tokens:
        return OperatorWork(0.0, 0.0, 0.0)
    moved = 2 if phase == "fwd" else 4
    return OperatorWork(0.0, float(model.dtype_bytes * moved * keys * features), moved)


def _grid(model: ModelSpec, quick: bool) -> Iterable[tuple[int, ...]]:
    """Usual numbers of virtual tokens; the tokens of the task do not matter."""
    for keys in (8, 128) if quick else (4, 16, 64, 256):
        for tokens in (16, 1024):
            yield 2 * model.kv_heads * model.head_dim, keys, tokens


_SILENT = frozenset(
    "auto_mapping base_model_name_or_path inference_mode peft_version revision runtime_config task_type "
    "num_attention_heads num_layers num_transformer_submodules token_dim "
    "encoder_hidden_size".split()
)
"""Keys of peft's configuration that say how a saved adapter began, or that its tensor shows."""


@METHODS.register("prefix_tuning")
class PrefixTuning:
    """The method."""

    summary = "trained keys and values in front of every sequence (prefix tuning)"
    spec = PrefixTuningSpec
    kinds: Mapping[str, OperatorKind] = {
        "prefix": OperatorKind(
            dims=("features", "keys", "tokens"),
            work=_work,
            grid=_grid,
            split=looked_up(1),
            samples=((8192, 16, 512),),
        )
    }

    def check(self, spec: PrefixTuningSpec, model: ModelSpec, where: str) -> None:
        """Refuse a projection."""
        if spec.prefix_projection:
            expected = "false: the prefix itself is trained, no network that computes it"
            raise SpecError(f"{where}.prefix_projection", True, expected)

    def attachments(self, spec: PrefixTuningSpec, model: ModelSpec, layer: int) -> tuple[Attachment, ...]:
        """The prefix of a layer."""
        return () if layer == EMBEDDING else _prefix(spec.num_virtual_tokens, model)

    def check_start(
        self, spec: PrefixTuningSpec, model: ModelSpec, config: Mapping[str, Any], where: str
    ) -> None:
        """Refuse an adapter of another method; that it has the task's tensor is seen when it is loaded."""
        assert spec.init is not None, "asked only then"
        said = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": spec.num_virtual_tokens}
        check_said(config, said, _SILENT, spec.init, where)

    def extra(self, spec: PrefixTuningSpec) -> Extra:
        """Its keys."""
        return Extra(keys=spec.num_virtual_tokens)


@lru_cache(maxsize=1024)
def _prefix(keys: int, model: ModelSpec) -> tuple[Attachment, ...]:
    """Keys, then values, of all heads; ranks cut them by heads, as those of the tokens."""
    site = site_of(model, "keys_values", "attention")
    width = site.out_features
    return (
        Attachment(
            site=site,
            reads="nothing",
            joins="extend",
            tensors=(TrainedTensor("prompt_embeddings", (keys, width), "keys_values", 1),),
            adapter=OperatorShape("prefix", (width, keys)),
        ),
    )
