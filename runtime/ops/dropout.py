"""Dropout whose masks depend on nothing but a task's seed and the place of a token.

A generator that is asked again and again gives a task other masks as soon as its sequences are cut, dealt or
ordered otherwise. So nothing is drawn in turn here: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) gives the
n-th number of a state without those before it, and a mask is a tree of such states::

    task seed -> optimizer step -> sequence in its global batch -> position -> linear -> four features

Any rank can compute the elements that it needs: a chunk its positions, a shard its features. There is no
state to save, and the backward computes a mask again instead of keeping it. An element takes 0.5 ns on one
core of an EPYC with AVX-512, and 1.4 ns with caches that other operators have filled, where
``torch.nn.functional.dropout`` takes 4.8 ns. It is integer arithmetic modulo 2^64, so every device, and every
version of torch and numpy, has the same.

Each element takes 16 bits: the rate is rounded to a multiple of 2^-16. :func:`keep_reference` is the plain
definition that the tests compare with.
"""

# T tokens, t tokens of one task, I features in, G groups of four features

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Keys = NDArray[np.uint64]

_GAMMA = 0x9E3779B97F4A7C15
_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_WORD = 1 << 64
_WORD_MIXING = tuple((np.uint64(shift), np.uint64(factor)) for shift, factor in _MIXING)
_WORD_LAST_SHIFT = np.uint64(_LAST_SHIFT)

_PER_KEY = 4
"""Features that share the 64 bits of a number, low bits first."""
_LEVELS = 1 << 16
"""Values of the 16 bits of a feature."""
_FIRST_BITS = 0x8000_8000_8000_8000

_BLOCK_NUMBERS = 1 << 14
"""Numbers that are computed at once: their two arrays stay in a core's cache."""


def child(key: int, number: int) -> int:
    """Number ``number`` (from 0) of the generator with state ``key``."""
    z = (key + _after(number)) % _WORD
    for shift, factor in _MIXING:
        z = (z ^ z >> shift) * factor % _WORD
    return z ^ z >> _LAST_SHIFT


def _after(number: int) -> int:
    """Growth of the state up to number ``number``."""
    return (number + 1) * _GAMMA % _WORD


def sequence_key(seed: int, step: int, sequence: int) -> int:
    """State of a sequence: of the task's seed, the optimizer step and the place in its global batch."""
    return child(child(child(0, seed), step), sequence)


def token_keys(sequence_keys: Keys, positions: NDArray[np.int64]) -> Keys:
    """States of tokens, element by element.

    Args:
        sequence_keys: State of the sequence of each token.
        positions: Position of each token in its sequence; broadcast against ``sequence_keys``.
    """
    return _mix(sequence_keys + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA))


def linear_key(path: str) -> int:
    """Number of a linear, from its path in the backbone, e.g. ``model.layers.0.self_attn.q_proj``."""
    return int.from_bytes(blake2b(path.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Dropout:
    """Dropout of one task at the input of one linear.

    As :class:`torch.nn.Dropout` between the input and A in peft: features are dropped with probability
    ``rate``, and what is kept is scaled by ``1 / (1 - rate)``. The frozen linear reads the whole input.
    """

    rate: float
    """Probability that a feature is dropped, above 0 and below 1."""
    linear: int
    """Number of the linear, :func:`linear_key`."""
    first_feature: int = 0
    """First feature of the linear that the rank has, where it has a part of its inputs."""

    @property
    def scale(self) -> float:
        """Factor on what is kept; the caller multiplies."""
        return 1.0 / (1.0 - self.rate)

    @property
    def threshold(self) -> int:
        """A feature is dropped if its 16 bits are below."""
        return min(round(self.rate * _LEVELS), _LEVELS - 1)

    @property
    def growth(self) -> int:
        """Growth of a token's state up to the linear, as a signed number."""
        return _signed(_after(self.linear))

    def keep(self, keys_t: Tensor, features: int) -> Tensor:
        """Features of each token that are kept.

        Args:
            keys_t: States of the tokens, :func:`token_keys` as int64, on any device.
            features: Number of features that the rank has.

        Returns:
            ``[t, features]`` uint8: 1 is kept, 0 is dropped.
        """
        # Torch has neither unsigned multiplication nor logical shifts, and takes twice as long on a CPU.
        kept = self.keep_by_numpy if keys_t.device.type == "cpu" else self.keep_by_torch
        return kept(keys_t, features)

    def keep_by_numpy(self, keys_t: Tensor, features: int) -> Tensor:
        """:meth:`keep` on a CPU."""
        groups, columns = self._groups(features)
        keep_tI = torch.empty(len(keys_t), features, dtype=torch.uint8)
        kept = keep_tI.numpy().view(np.bool_)
        rows = _mix(keys_t.numpy().view(np.uint64) + np.uint64(_after(self.linear)))[:, None]
        threshold, after = np.uint16(self.threshold), _after_groups(groups)
        block = max(1, _BLOCK_NUMBERS // len(groups))
        numbers = np.empty((min(block, len(rows)), len(groups)), dtype=np.uint64)
        scratch = np.empty_like(numbers)
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            numbers, scratch = numbers[: len(part)], scratch[: len(part)]
            _mix(np.add(part, after, out=numbers), scratch)
            bits = numbers.astype("<u8", copy=False).view("<u2")[:, columns]
            np.greater_equal(bits, threshold, out=kept[start : start + block])
        return keep_tI

    def keep_by_torch(self, keys_t: Tensor, features: int) -> Tensor:
        """:meth:`keep` on any device: int64 alone, and nothing is read back from it."""
        groups, columns = self._groups(features)
        rows_t = _mix_by_torch(keys_t + self.growth)
        steps_G = torch.arange(groups.start + 1, groups.stop + 1, device=keys_t.device) * _signed(_GAMMA)
        numbers_tG = _mix_by_torch(rows_t[:, None] + steps_G)
        # Signed numbers begin with the upper half. With their first bits flipped they have the right order.
        bits = (numbers_tG ^ _signed(_FIRST_BITS)).view(torch.int16)[:, columns]
        return (bits >= self.threshold - _LEVELS // 2).view(torch.uint8)

    def _groups(self, features: int) -> tuple[range, slice]:
        """Groups that have the rank's features, and which of all features of these groups those are."""
        first, skipped = divmod(self.first_feature, _PER_KEY)
        stop = -(-(self.first_feature + features) // _PER_KEY)
        return range(first, stop), slice(skipped, skipped + features)


def kept_input(x_tI: Tensor, keep_tI: Tensor | None) -> Tensor:
    """What an adapter reads: the input, with zeros where features are dropped."""
    # On a CPU a product of two dtypes would make the converted mask and the result.
    return x_tI if keep_tI is None else keep_tI.to(x_tI.dtype).mul_(x_tI)


def keep_reference(
    seed: int,
    step: int,
    sequence: int,
    *,
    path: str,
    rate: float,
    positions: range,
    features: range,
) -> list[list[int]]:
    """Definition of the mask of a part of one sequence, number by number: ``[positions][features]``."""
    kept = []
    for position in positions:
        row = child(child(sequence_key(seed, step, sequence), position), linear_key(path))
        kept.append(
            [
                int(child(row, f // _PER_KEY) >> 16 * (f % _PER_KEY) & _LEVELS - 1 >= round(rate * _LEVELS))
                for f in features
            ]
        )
    return kept


@lru_cache(maxsize=64)
def _after_groups(groups: range) -> Keys:
    """:func:`_after` of each group."""
    return (np.arange(groups.start, groups.stop, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GAMMA)


def _mix(z: Keys, scratch: Keys | None = None) -> Keys:
    """The generator's output of its state, in place."""
    shifted = np.empty_like(z) if scratch is None else scratch
    for shift, factor in _WORD_MIXING:
        z ^= np.right_shift(z, shift, out=shifted)
        z *= factor
    z ^= np.right_shift(z, _WORD_LAST_SHIFT, out=shifted)
    return z


def _mix_by_torch(z: Tensor) -> Tensor:
    for shift, factor in _MIXING:
        z ^= _shifted(z, shift)
        z *= _signed(factor)
    z ^= _shifted(z, _LAST_SHIFT)
    return z


def _shifted(z: Tensor, shift: int) -> Tensor:
    """Bits shifted to the right, with zeros from the left."""
    return (z >> shift).bitwise_and_((1 << 64 - shift) - 1)


def _signed(number: int) -> int:
    number %= _WORD
    return number - _WORD if number >= _WORD // 2 else number
