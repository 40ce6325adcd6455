"""IA3 (arXiv 2205.05638): learned vectors that multiply linears' outputs, or feed-forward ones' inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal

from muxtune.model import ALL_LINEAR, ModelSpec
from muxtune.operators import OperatorKind, OperatorShape, OperatorWork, Phase
from muxtune.operators.kinds import looked_up
from muxtune.peft.method import METHODS
from muxtune.peft.representation import NOTHING, Attachment, Extra, Sharded, TrainedTensor
from muxtune.peft.sites import EMBEDDING, Site, linear_sites
from muxtune.peft.spec import ModuleNames
from muxtune.peft.start import check_said
from muxtune.peft.targets import TargetedSpec, module_path, targeted_paths
from muxtune.support.errors import SpecError


class Ia3Spec(TargetedSpec):
    """Learned vectors (arXiv 2205.05638): ``l * (W x + b)``, or ``W (l * x) + b`` of feed-forward linears."""

    method: Literal["ia3"]
    """The PEFT method."""
    feedforward: ModuleNames = ()
    """Those of the targets whose inputs are multiplied, as PEFT's ``feedforward_modules``."""


def _work(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """A product, a copy of what was multiplied, and the task's rows put back; backward: both products.

    Where the linear shares its product with others, its columns are put back among theirs first.
    """
    features, width, tokens = dims
    copies = width * (2 if features != width else 1)
    if phase == "fwd":
        return OperatorWork(
            1.0 * features * tokens, model.dtype_bytes * tokens * (4 * features + 2 * copies), 4
        )
    return OperatorWork(3.0 * features * tokens, model.dtype_bytes * tokens * (6 * features + 2 * copies), 6)


def _grid(model: ModelSpec, quick: bool) -> Iterable[tuple[int, ...]]:
    """Every linear's outputs in their product, and the inputs of those that read alone."""
    tokens = (64, 1024) if quick else (16, 64, 256, 1024, 4096)
    sizes = {_size(model, site, rewrites=False) for site in linear_sites(model)}
    sizes |= {_size(model, site, rewrites=True) for site in linear_sites(model) if _alone(model, site)}
    return ((*size, n) for size in sorted(sizes) for n in tokens)


_SILENT = frozenset(
    "auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode peft_version "
    "revision runtime_config target_modules task_type feedforward_modules init_ia3_weights".split()
)
"""Keys of peft's configuration that do not change what a saved adapter computes, or that its tensors show."""


@METHODS.register("ia3")
class Ia3:
    """The method."""

    summary = "learned vectors that multiply outputs and inputs of linears (IA3)"
    spec = Ia3Spec
    kinds: Mapping[str, OperatorKind] = {
        "ia3": OperatorKind(
            dims=("features", "width", "tokens"),
            work=_work,
            grid=_grid,
            split=looked_up(2),
            fitted="adapter",
            samples=((4096, 4096, 512), (1024, 6144, 512)),
        )
    }

    def check(self, spec: Ia3Spec, model: ModelSpec, where: str) -> None:
        """Refuse targets that match nothing, layers that are not there, and feed-forward ones beside them."""
        spec.check_targets(model, where)
        named = not isinstance(spec.targets, str) and spec.targets != (ALL_LINEAR,)
        for name in spec.feedforward:
            if named and name not in spec.targets:
                expected = f"one of its targets, {', '.join(spec.targets)}, as PEFT requires"
                raise SpecError(f"{where}.feedforward", name, expected)
            if not any(_ends_with((name,), path) for path in _all_paths(spec, model)):
                expected = f"a linear of {model.name} that its targets match"
                raise SpecError(f"{where}.feedforward", name, expected)

    def attachments(self, spec: Ia3Spec, model: ModelSpec, layer: int) -> tuple[Attachment, ...]:
        """A vector at each targeted linear."""
        if layer == EMBEDDING:
            return ()
        return _vectors(model, targeted_paths(spec, model)[layer], feedforward_paths(spec, model, layer))

    def check_start(self, spec: Ia3Spec, model: ModelSpec, config: Mapping[str, Any], where: str) -> None:
        """Refuse an adapter of another method; that it has the task's tensors is seen when it is loaded."""
        assert spec.init is not None, "asked only then"
        check_said(config, {"peft_type": "IA3"}, _SILENT, spec.init, where)

    def extra(self, spec: Ia3Spec) -> Extra:
        """Nothing."""
        return NOTHING


def feedforward_paths(spec: Ia3Spec, model: ModelSpec, layer: int) -> frozenset[str]:
    """Paths, inside a layer, of the targeted linears whose inputs are multiplied."""
    return frozenset(
        path
        for path in targeted_paths(spec, model)[layer]
        if _ends_with(spec.feedforward, module_path(model, layer, path))
    )


def _all_paths(spec: Ia3Spec, model: ModelSpec) -> list[str]:
    paths = enumerate(targeted_paths(spec, model))
    return [module_path(model, layer, path) for layer, own in paths for path in own]


def _ends_with(names: tuple[str, ...], path: str) -> bool:
    """Peft's rule for ``feedforward_modules``, which needs no dot before the name."""
    return any(path.endswith(name) for name in names)


@lru_cache(maxsize=8192)
def _vectors(model: ModelSpec, targeted: frozenset[str], rewritten: frozenset[str]) -> tuple[Attachment, ...]:
    return tuple(
        _vector(model, site, rewrites=site.path in rewritten)
        for site in linear_sites(model)
        if site.path in targeted
    )


def _vector(model: ModelSpec, site: Site, *, rewrites: bool) -> Attachment:
    """The vector is cut where its features are; before a rank's own outputs each has a part of its gradient.

    A linear that rewrites what others read too is computed again for the task, by itself.
    """
    by_outputs = site.split_by_outputs
    shape: tuple[int, int]
    sharded: Sharded
    if rewrites:
        shape, sharded, dim = (1, site.in_features), "none" if by_outputs else "inputs", 1
    else:
        shape, sharded, dim = (site.out_features, 1), "outputs" if by_outputs else "none", 0
    again = rewrites and not _alone(model, site)
    return Attachment(
        site=site,
        reads="input" if rewrites else "output",
        rewrites_input=rewrites,
        joins="multiply",
        tensors=(TrainedTensor("ia3_l", shape, sharded, dim, partial=rewrites and by_outputs),),
        adapter=OperatorShape("ia3", _size(model, site, rewrites=rewrites)),
        dispatch=OperatorShape("linear", (site.in_features, site.out_features)) if again else None,
        kept_bytes=max(shape) * model.dtype_bytes,  # what was multiplied
        input_flops=float(max(shape)),
    )


def _size(model: ModelSpec, site: Site, *, rewrites: bool) -> tuple[int, int]:
    """Features that are multiplied, and those that are put back with them."""
    if rewrites and _alone(model, site):
        return site.in_features, site.in_features
    features = site.in_features if rewrites else site.out_features
    width = sum(linear.out_features for linear in model.linears if linear.block == site.block)
    return features, max(features, width)


def _alone(model: ModelSpec, site: Site) -> bool:
    """Whether no other linear reads what it reads."""
    return sum(linear.block == site.block for linear in model.linears) == 1
