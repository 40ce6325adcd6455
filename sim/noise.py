"""What durations vary by: log-normal factors with mean 1, the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import isfinite

import numpy as np

from muxtune.support.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Spread of durations, and the seed of its draws."""

    sigma: float = 0.0
    """Standard deviation of a factor's logarithm; about the relative spread. 0 draws nothing."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isfinite(self.sigma) and self.sigma >= 0):
            raise SpecError("noise", self.sigma, "a finite number, at least 0")
        if self.seed < 0:
            raise SpecError("seed", self.seed, "at least 0")

    def factors(self, *actor: object) -> Factors:
        """Draws of one actor; they depend on the seed and the actor, not on what others draw when."""
        return Factors(self, actor)


class Factors:
    """A row of draws."""

    def __init__(self, noise: Noise, actor: Sequence[object]) -> None:
        self._sigma = noise.sigma
        self._generator: np.random.Generator | None = None
        if noise.sigma:
            name = int.from_bytes(blake2b(repr(tuple(actor)).encode(), digest_size=8).digest(), "big")
            self._generator = np.random.default_rng([noise.seed, name])

    def scale(self, seconds: Sequence[float]) -> Sequence[float]:
        """Every duration times its own factor."""
        if self._generator is None:
            return seconds
        factors = self._generator.lognormal(-(self._sigma**2) / 2, self._sigma, len(seconds))
        return (factors * seconds).tolist()  # type: ignore[no-any-return]  # numpy says Any
