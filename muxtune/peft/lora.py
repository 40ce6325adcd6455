"""LoRA (arXiv 2106.09685): a low-rank pair beside a linear, ``W x + scale B A x``.

With rsLoRA (arXiv 2312.03732) the scale is ``alpha / sqrt(r)`` instead of ``alpha / r``. With DoRA (arXiv
2402.09353) the outputs are scaled as well: a trained magnitude in the place of the norm of each row of
``W + scale B A``. Ranks and alphas may differ by linear, and biases of the backbone may be trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from math import sqrt
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from muxtune.model import DTYPE_BYTES, ModelSpec
from muxtune.operators import OperatorKind, OperatorShape
from muxtune.peft.lora_work import KINDS
from muxtune.peft.method import METHODS
from muxtune.peft.representation import NOTHING, Attachment, Extra, TrainedTensor
from muxtune.peft.sites import EMBEDDING, Site, linear_sites
from muxtune.peft.spec import LARGEST_FACTOR
from muxtune.peft.start import check_said
from muxtune.peft.targets import TargetedSpec, module_path, targeted_paths
from muxtune.support.errors import SpecError

PLAIN_KIND = "lora"
"""Operator of a pair of factors, which every profile has."""

Pattern = tuple[tuple[str, Any], ...]
"""Ends of module paths, which may be regular expressions, and what holds there; the first that matches."""

FACTOR_A, FACTOR_B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
"""Names of the tensors of an attachment."""


def _pairs_read(value: object, kind: type[int] | type[float], what: str) -> Pattern:
    """A mapping from patterns to positive numbers, as a tuple of pairs, which can be hashed."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple):
        raise ValueError(f"expected a mapping from names of linears to {what}, as {{down_proj: 4}}")
    for name, number in pairs:
        try:
            re.compile(str(name))
        except re.error as error:
            raise ValueError(f"expected names or regular expressions, {name!r} is neither") from error
        is_number = isinstance(number, int | kind) and not isinstance(number, bool)
        if not (isinstance(name, str) and is_number and 0 < number <= LARGEST_FACTOR):
            raise ValueError(f"expected {what} above 0 for each name; {name!r} has {number!r}")
    return tuple((name, kind(number)) for name, number in pairs)


def _ranks_read(value: object) -> Pattern:
    return _pairs_read(value, int, "whole ranks")


def _alphas_read(value: object) -> Pattern:
    return _pairs_read(value, float, "alphas")


_SCHEMA = WithJsonSchema(
    {"type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0}}
)
RankPattern = Annotated[Pattern, BeforeValidator(_ranks_read), PlainSerializer(dict), _SCHEMA]
AlphaPattern = Annotated[Pattern, BeforeValidator(_alphas_read), PlainSerializer(dict), _SCHEMA]


class LoraSpec(TargetedSpec):
    """Low-rank adapters (arXiv 2106.09685): ``W x + (alpha / r) B A x``."""

    method: Literal["lora"]
    """The PEFT method."""
    r: int = Field(gt=0)
    """Rank of the update."""
    alpha: float = Field(gt=0, le=LARGEST_FACTOR)
    """The update is scaled by ``alpha / r``."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a feature of A's input is dropped, as PEFT's ``lora_dropout``."""
    use_rslora: bool = False
    """Whether the update is scaled by ``alpha / sqrt(r)`` instead."""
    use_dora: bool = False
    """Whether a trained magnitude takes the place of each output's norm (DoRA)."""
    rank_pattern: RankPattern = ()
    """Ranks of linears that have another: by the end of their path, or a regular expression for it."""
    alpha_pattern: AlphaPattern = ()
    """Alphas of linears that have another."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Biases of the backbone that are trained: those of adapted linears, or all."""

    quiet = TargetedSpec.quiet | {"use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias"}

    @property
    def drops(self) -> bool:
        """Whether it has dropout."""
        return self.dropout > 0

    @property
    def starts_from_weights(self) -> bool:
        """Magnitudes start as norms of weights, and biases as those of the backbone."""
        return self.use_dora or self.bias != "none"

    def rank(self, path: str) -> int:
        """Rank at the linear with a whole path of the backbone."""
        return int(_holds_at(self.rank_pattern, path, self.r))

    def scale(self, path: str) -> float:
        """Factor of the update at the linear with a whole path of the backbone."""
        rank, alpha = self.rank(path), float(_holds_at(self.alpha_pattern, path, self.alpha))
        return alpha / (sqrt(rank) if self.use_rslora else rank)


@lru_cache(maxsize=1 << 16)
def _holds_at(pattern: Pattern, path: str, default: float) -> float:
    """Value of the first pattern that matches the whole path, or its end behind a dot; peft's rule."""
    for name, value in pattern:
        if re.match(rf"(.*\.)?({name})$", path):
            return float(value)
    return default


@METHODS.register("lora")
class Lora:
    """The method."""

    summary = "low-rank pairs beside linears (LoRA, rsLoRA, DoRA)"
    spec = LoraSpec
    kinds: Mapping[str, OperatorKind] = KINDS

    def check(self, spec: LoraSpec, model: ModelSpec, where: str) -> None:
        """Refuse targets and patterns that match nothing, missing layers, and too large a rank."""
        spec.check_targets(model, where)
        sizes = {
            module_path(model, layer, linear.name): min(linear.in_features, linear.out_features)
            for layer, names in enumerate(targeted_paths(spec, model))
            for linear in model.linears
            if linear.name in names
        }
        for field, pattern in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
            for name, _ in pattern:
                if not any(_holds_at(((name, 1),), path, 0) for path in sizes):
                    known = ", ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in sizes))
                    raise SpecError(f"{where}.{field}", name, f"an adapted linear: {known}")
            for path in sizes:
                if _holds_at(pattern, path, 0) != _holds_at(tuple(sorted(pattern)), path, 0):
                    expected = f"one meaning for {path}: peft saves patterns in alphabetical order"
                    raise SpecError(f"{where}.{field}", dict(pattern), expected)
        for path, size in sizes.items():
            if spec.rank(path) > size:
                if spec.rank(path) != spec.r:
                    raise SpecError(f"{where}.rank_pattern", spec.rank(path), f"at most {size} at {path}")
                largest = min(size for path, size in sizes.items() if spec.rank(path) == spec.r)
                expected = f"at most {largest}, the smallest side of its linears in {model.name}"
                raise SpecError(f"{where}.r", spec.r, expected)
        if spec.bias == "all" and not model.rms_norm:
            expected = f"none or lora_only: the norms of {model.name} have biases, which are not trained here"
            raise SpecError(f"{where}.bias", spec.bias, expected)

    def check_start(self, spec: LoraSpec, model: ModelSpec, config: Mapping[str, Any], where: str) -> None:
        """Refuse an adapter with other tensors or scales; dropout and where it was trained are free."""
        assert spec.init is not None, "asked only then"
        said = {
            "peft_type": "LORA",
            "use_rslora": spec.use_rslora,
            "use_dora": spec.use_dora,
            "bias": spec.bias,
        }
        check_said(config, said, _SILENT, spec.init, where)
        try:
            saved = _saved_spec(config)
            saved.check_targets(model, where)
        except (ValueError, SpecError) as error:
            reason = str(error).splitlines()[0]
            expected = f"an adapter whose configuration can be read ({reason})"
            raise SpecError(f"{where}.init", str(spec.init), expected) from error
        theirs, ours = _pairs_of(saved, model), _pairs_of(spec, model)
        for path in sorted(theirs.keys() | ours.keys()):
            if theirs.get(path) != ours.get(path):
                expected = (
                    f"an adapter with {_told(ours.get(path))} at {path}, and not {_told(theirs.get(path))}"
                )
                raise SpecError(f"{where}.init", str(spec.init), expected)

    def attachments(self, spec: LoraSpec, model: ModelSpec, layer: int) -> tuple[Attachment, ...]:
        """A pair at each targeted linear, and what comes with it."""
        if layer == EMBEDDING:
            return ()
        names = targeted_paths(spec, model)[layer]
        ranks = tuple((name, spec.rank(module_path(model, layer, name))) for name in sorted(names))
        return _attachments(spec, model, ranks)

    def extra(self, spec: LoraSpec) -> Extra:
        """Nothing."""
        return NOTHING


_SILENT = frozenset(
    "alpha_pattern arrow_config auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out "
    "inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha "
    "lora_dropout megatron_core peft_version qalora_group_size r rank_pattern revision runtime_config "
    "target_modules task_type".split()
)
"""Keys of a configuration that are read apart, or do not change what a saved adapter computes."""


def _saved_spec(config: Mapping[str, Any]) -> LoraSpec:
    """What a saved adapter says of its linears, ranks and scales."""
    layers = config.get("layers_to_transform")
    return LoraSpec.model_validate(
        {
            "method": "lora",
            "r": config.get("r"),
            "alpha": config.get("lora_alpha"),
            "targets": config.get("target_modules"),
            "exclude_modules": config.get("exclude_modules"),
            "layers": [layers] if isinstance(layers, int) else layers,
            "rank_pattern": config.get("rank_pattern") or {},
            "alpha_pattern": config.get("alpha_pattern") or {},
            "use_rslora": config.get("use_rslora", False),
        }
    )


def _pairs_of(spec: LoraSpec, model: ModelSpec) -> dict[str, tuple[int, float]]:
    """Rank and scale at the path of each adapted linear."""
    paths = (
        module_path(model, layer, name)
        for layer, names in enumerate(targeted_paths(spec, model))
        for name in names
    )
    return {path: (spec.rank(path), spec.scale(path)) for path in paths}


def _told(pair: tuple[int, float] | None) -> str:
    return "nothing" if pair is None else f"rank {pair[0]} and scale {pair[1]:g}"


@lru_cache(maxsize=8192)
def _attachments(
    spec: LoraSpec, model: ModelSpec, ranks: tuple[tuple[str, int], ...]
) -> tuple[Attachment, ...]:
    """Attachments of a layer, from the ranks at its adapted linears; one object for layers that are alike."""
    rank_at = dict(ranks)
    found: list[Attachment] = []
    for site in linear_sites(model):
        adapted = site.path in rank_at
        if adapted:
            r = rank_at[site.path]
            found += (
                [_dropped_dora(spec, model, site, r)]
                if spec.use_dora and spec.dropout
                else [
                    _pair(spec, model, site, r),
                    *([_magnitude(model, site)] if spec.use_dora else []),
                ]
            )
        linear = next(linear for linear in model.linears if linear.name == site.path)
        if model.has_bias(linear) and (spec.bias == "all" or (spec.bias == "lora_only" and adapted)):
            found.append(_bias(site, adapted=adapted))
    return tuple(found)


def _factors(site: Site, r: int) -> tuple[TrainedTensor, TrainedTensor]:
    """A is cut where the linear's inputs are, B where its outputs are; the other factor is whole.

    Each rank has the whole factor, and a part of the sum that is its gradient.
    """
    by_outputs = site.split_by_outputs
    return (
        TrainedTensor(FACTOR_A, (r, site.in_features), "none" if by_outputs else "inputs", 1, by_outputs),
        TrainedTensor(
            FACTOR_B, (site.out_features, r), "outputs" if by_outputs else "none", 0, not by_outputs
        ),
    )


def _pair(spec: LoraSpec, model: ModelSpec, site: Site, r: int) -> Attachment:
    i, o = site.in_features, site.out_features
    return Attachment(
        site=site,
        tensors=_factors(site, r),
        adapter=OperatorShape("lora", (i, o, r)),
        dispatch=OperatorShape("dropout", (i,)) if spec.dropout else None,
        launch=None if spec.dropout else "lora",
        keeps_input=True,
        kept_bytes=r * _factor_bytes(model),  # A x
        input_flops=2.0 * r * i,
        dropout=spec.dropout,
    )


def _magnitude(model: ModelSpec, site: Site) -> Attachment:
    """Behind the sum over the ranks: all of them scale what is whole, so each has the whole gradient."""
    o = site.out_features
    sharded: Literal["outputs", "none"] = "outputs" if site.split_by_outputs else "none"
    return Attachment(
        site=site,
        reads="output",
        joins="multiply",
        tensors=(TrainedTensor(MAGNITUDE, (o,), sharded),),
        adapter=OperatorShape("lora_magnitude", (o,)),
        kept_bytes=o * model.dtype_bytes,  # the output without bias, before it is scaled
    )


def _dropped_dora(spec: LoraSpec, model: ModelSpec, site: Site, r: int) -> Attachment:
    """With dropout peft computes the frozen product of the dropped input again, and scales that.

    All of it is a term of the ranks' sum; so is the magnitude's gradient.
    """
    i, o, by_outputs = site.in_features, site.out_features, site.split_by_outputs
    magnitude = TrainedTensor(MAGNITUDE, (o,), "outputs" if by_outputs else "none", 0, not by_outputs)
    return Attachment(
        site=site,
        tensors=(*_factors(site, r), magnitude),
        adapter=OperatorShape("lora_dropped_dora", (i, o, r)),
        dispatch=OperatorShape("dropout", (i,)),
        kept_bytes=(2 * i + o + r) * _factor_bytes(model),  # mask and dropped input; what is scaled; A x
        input_flops=2.0 * i * (r + o),
        dropout=spec.dropout,
    )


def _bias(site: Site, *, adapted: bool) -> Attachment:
    """Behind the sum, to which the frozen bias was added once; peft's module at an adapted linear has it."""
    o, name = site.out_features, "base_layer.bias" if adapted else "bias"
    return Attachment(
        site=site,
        reads="output",
        tensors=(TrainedTensor(name, (o,), "outputs" if site.split_by_outputs else "none"),),
        adapter=OperatorShape("lora_bias", (o,)),
    )


def _factor_bytes(model: ModelSpec) -> int:
    return max(model.dtype_bytes, DTYPE_BYTES["float32"])


def everywhere(r: int) -> LoraSpec:
    """A pair of this rank on every linear: what the profiler's whole stages have."""
    return LoraSpec(method="lora", r=r, alpha=float(r), targets=("all-linear",))


def at_first_linear(model: ModelSpec) -> LoraSpec:
    """A pair on the first linear of each layer: about the least that an adapter makes a backbone keep."""
    name = model.linears[0].name.rsplit(".", 1)[-1]
    return LoraSpec(method="lora", r=1, alpha=1, targets=(name,))
