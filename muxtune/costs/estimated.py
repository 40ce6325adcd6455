"""Estimated costs: for a backbone that nobody measured, from what was measured of another on this machine.

The other's coefficients give operators of this one their analytic shape, and its ratios of measured to
analytic time what real code makes of it: a linear takes the ratio of the nearest measured widths, all other
operators that of their kind at as many tokens. What an action costs beyond its operators is the other's, too.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from muxtune.costs.needs import PLAIN_KINDS
from muxtune.costs.profile import Profile, load_provenance
from muxtune.costs.profiled import ExtrapolationWarning, ProfiledCosts
from muxtune.costs.ref import CostsRef
from muxtune.costs.roofline import RooflineCosts
from muxtune.model import ModelSpec
from muxtune.operators import Operator, Phase
from muxtune.support.errors import UserError

Source = Literal["another backbone", "calibration"]


class EstimateError(BaseModel):
    """How far iteration times by estimates are from those by a whole profile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float = Field(ge=0)
    """Mean relative error."""
    largest: float = Field(ge=0)
    cases: int = Field(gt=0)
    """Pairs of a backbone and a workload."""


class EstimateErrors(BaseModel):
    """What ``python -m benchmarks.estimates --write`` has found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: str
    date: str
    command: str
    backbones: tuple[str, ...]
    errors: dict[Source, EstimateError]


@cache
def usual_errors() -> EstimateErrors:
    """Errors of estimates that were measured when they were last looked at."""
    return EstimateErrors.model_validate_json(files("muxtune.data").joinpath(ERRORS_FILE).read_text())


ERRORS_FILE = "estimate_errors.json"
"""File in :mod:`muxtune.data`."""


class EstimatedCosts(ProfiledCosts):
    """Costs of a backbone from the profile of another, or from a calibration.

    Args:
        profile: What was measured.
        model: The backbone whose operators are priced.
        origin: Where the profile comes from.
        better: Command that measures this backbone.
    """

    def __init__(self, profile: Profile, model: ModelSpec, origin: Source, better: str) -> None:
        with warnings.catch_warnings():  # stages of a calibration lie beyond its few operators
            warnings.simplefilter("ignore", ExtrapolationWarning)
            super().__init__(profile, profile.model)
        self.model = model
        self.analytic = RooflineCosts(self.analytic.coefficients, model)
        self.origin: Source = origin
        self._better = better
        self._measured = profile.model
        self._cache = {}

    @property
    def ref(self) -> CostsRef:
        """Identity: that of what was measured, and of the shapes that it is used for."""
        return CostsRef(
            kind="estimated",
            profile_id=f"estimated-{self.model.name}-{self._digest(PLAIN_KINDS)[:12]}",
            device=self.profile.provenance.device,
            digest=self._digest(self.profile.kinds),
            usual_error=None if self._error is None else self._error.mean,
        )

    @property
    def _error(self) -> EstimateError | None:
        return usual_errors().errors.get(self.origin)

    def _digest(self, kinds: frozenset[str]) -> str:
        content = f"{self.profile.of_kinds(kinds).digest} {self.model.model_dump_json(exclude=_NO_SHAPES)}"
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def contention(self) -> float | None:
        """That of the source."""
        return None if self.profile.overlaps is None else self.profile.overlaps.contention

    @property
    def largest_group(self) -> int | None:
        """Any, as collectives are estimated over the measured link."""
        return None

    @contextmanager
    def noting(self) -> Iterator[list[str]]:
        """That all of it is estimated, with its usual error and what measures; then the source's notes."""
        with super().noting() as notes:
            yield notes
        notes.insert(0, self.sentence)

    @property
    def sentence(self) -> str:
        """That these are estimates, how far off they usually are, and what measures."""
        source = (
            f"what was measured of {self._measured.name} on this machine"
            if self.origin == "another backbone"
            else "a calibration of a few seconds"
        )
        error = "how far off such estimates are was not measured"
        if self._error is not None:
            error = (
                f"iteration times by such estimates were {self._error.mean:.0%} off on average and "
                f"{self._error.largest:.0%} at most, relative to a profile's"
            )
        return f"estimated from {source}; {error}; `{self._better}` measures"

    def _interpolate(self, op: Operator, phase: Phase) -> tuple[float, float]:
        """Seconds; nothing lies outside, and kinds that were not measured cost what their shape says."""
        try:
            return super()._interpolate(op, phase)[0], 0.0
        except UserError:
            return self.analytic.latency_s(op, phase), 0.0


_NO_SHAPES = {"name", "source", "init_seed"}

_FAR = math.log(4.0)
"""A width that differs by more is no neighbour: other caches, other loops of the libraries."""

_OTHER_FAMILY = math.log(1.5)
_OTHER_RANKS = math.log(2.0)
"""What these differences weigh beside factors in widths."""


def nearest_profile(folder: Path, model: ModelSpec, ranks: int) -> Path | None:
    """The kept profile of a backbone that is most like another; None if none is like it.

    Args:
        folder: Profiles of this machine.
        model: The backbone that has none.
        ranks: Ranks that will compute at once.
    """
    found: list[tuple[float, str, Path]] = []
    for path in sorted(folder.glob("*.parquet")):
        provenance = load_provenance(path)
        if provenance is None or provenance.model.dtype != model.dtype:
            continue
        factors = [
            abs(math.log(b / a)) for a, b in zip(_widths(provenance.model), _widths(model), strict=True)
        ]
        if max(factors) > _FAR:
            continue
        distance = sum(factors)
        distance += _OTHER_FAMILY * (provenance.model.family != model.family)
        distance += _OTHER_RANKS * (provenance.ranks != ranks)
        found.append((distance, path.name, path))
    return min(found)[2] if found else None


def _widths(model: ModelSpec) -> tuple[int, ...]:
    return model.hidden, model.ffn, model.heads * model.head_dim, model.kv_heads * model.head_dim


def save_errors(errors: EstimateErrors, path: Path) -> None:
    """Write the file of errors, as it ships."""
    path.write_text(json.dumps(errors.model_dump(mode="json"), indent=1) + "\n")
