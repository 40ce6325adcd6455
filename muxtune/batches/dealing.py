"""Groups of the global batches of many steps at once: the rules of :mod:`muxtune.batches.layout`, in numpy.

:func:`~muxtune.batches.deal_sequences` and :func:`~muxtune.batches.group_tokens` say which
sequences share a micro-batch in one step; here it is only counted how many tokens they have, in thousands of
steps. Both say the same numbers (tested).
"""

# Shapes, in names in lower case: S steps, K sequences of a global batch, dealt as T turns of G groups; R rows
# are all leading axes (...), flat

from __future__ import annotations

from collections.abc import Sequence
from math import lcm

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def deal_lengths(lengths_k: Ints, groups: int) -> Ints:
    """Sequences as they are dealt to pack: ``[..., T, G]``, 0 where a turn has no more.

    Args:
        lengths_k: Longest first, ``[..., K]``.
        groups: G, the number of groups.
    """
    *leading, size = lengths_k.shape
    turns = -(-size // groups)
    padded = np.zeros((*leading, turns * groups), dtype=np.int64)
    padded[..., :size] = lengths_k
    dealt = padded.reshape(*leading, turns, groups)
    dealt[..., 1::2, :] = dealt[..., 1::2, ::-1]  # back and forth
    return dealt


def packed_sizes(dealt_tg: Ints) -> Ints:
    """Tokens of each group, packed: ``[..., G]``."""
    return np.asarray(dealt_tg.sum(axis=-2))


def chunked_sizes(dealt_tg: Ints, chunk_tokens: int) -> Ints:
    """Tokens of each group in chunks: ``[..., G]``.

    :func:`muxtune.batches.chunks.count_chunks` for all groups at once: beside the full chunks of longer
    sequences, each rest, longest first, goes into the first chunk with room.
    """
    *leading, turns, groups = dealt_tg.shape
    lengths_rt = np.moveaxis(dealt_tg, -2, -1).reshape(-1, turns)
    full_r = (lengths_rt // chunk_tokens).sum(axis=1)
    items_rt = -np.sort(-(lengths_rt % chunk_tokens), axis=1)
    rows = np.arange(len(items_rt))
    free_rt = np.full((len(items_rt), min(turns, _FIRST_BINS)), chunk_tokens, dtype=np.int64)
    for turn in range(turns):
        length = items_rt[:, turn]
        first = np.argmax(free_rt >= length[:, None], axis=1)
        if (free_rt[rows, first] < length).any():  # all chunks are too full
            more = np.full((len(rows), min(free_rt.shape[1], turns - free_rt.shape[1])), chunk_tokens)
            free_rt = np.concatenate([free_rt, more], axis=1)
            first = np.argmax(free_rt >= length[:, None], axis=1)
        free_rt[rows, first] -= length
    chunks = full_r + (free_rt < chunk_tokens).sum(axis=1)
    return np.asarray((chunks * chunk_tokens).reshape(*leading, groups))


_FIRST_BINS = 4
"""Chunks of a group that are looked at before there are more; rests need few."""


def group_counts(size: int, groups: int) -> Ints:
    """Sequences of each group under ``pad``, which keeps their order: ``[G]``."""
    room = -(-size // groups)
    return np.clip(size - np.arange(groups) * room, 0, room)


def largest_stream(sizes: Sequence[Ints], phase: range) -> int:
    """Tokens of the fullest micro-batch of some steps, as ``place_groups`` fills them.

    In a step, the largest group of a task goes into the emptiest micro-batch. So micro-batches differ by no
    more than the groups of some task, and the step's total bounds the fullest from both sides; only steps
    that may have it are laid out.

    Args:
        sizes: Per task, tokens of its groups in the steps after which they repeat, ``[S, G]``.
        phase: The steps.
    """
    steps = min(len(phase), lcm(*(len(tokens) for tokens in sizes)))  # after which all repeat
    groups: int = sizes[0].shape[1]
    descending = [-np.sort(-tokens, axis=1) for tokens in sizes]
    total = np.zeros(steps, dtype=np.int64)
    spread = np.zeros(steps, dtype=np.int64)
    for tokens in descending:
        total += _over(tokens.sum(axis=1), phase.start, steps)
        np.maximum(spread, _over(tokens[:, 0] - tokens[:, -1], phase.start, steps), out=spread)
    bound = (total + (groups - 1) * spread) // groups
    likely = np.argpartition(-bound, min(steps, _LAID_OUT) - 1)[:_LAID_OUT]
    fullest = _fullest(descending, phase.start + likely)
    bound[likely] = 0
    promising = np.flatnonzero(bound > fullest)
    promising = promising[np.argsort(-bound[promising])]
    for start in range(0, len(promising), _LAID_OUT):
        chosen = promising[start : start + _LAID_OUT]
        if bound[chosen[0]] <= fullest:
            break
        fullest = max(fullest, _fullest(descending, phase.start + chosen))
    return fullest


def _fullest(descending: Sequence[Ints], steps: Ints) -> int:
    """Tokens of the fullest micro-batch of these steps.

    Args:
        descending: Tokens of each task's groups, as in :func:`largest_stream`, the largest group first.
        steps: Numbers of the steps.
    """
    filled = np.zeros((len(steps), descending[0].shape[1]), dtype=np.int64)
    for tokens in reversed(descending):
        filled += tokens[steps % len(tokens)]
        filled.sort(axis=1)  # emptiest first, and the largest group comes first
    return int(filled[:, -1].max())


_LAID_OUT = 2048
"""Steps that are laid out at once."""


def _over(values_s: Ints, first: int, steps: int) -> Ints:
    """Values that repeat after S steps, for ``steps`` steps from ``first`` on."""
    return np.resize(np.roll(values_s, -(first % len(values_s))), steps)
