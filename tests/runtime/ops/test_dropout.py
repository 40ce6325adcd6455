"""Masks are a function of place alone, the same on every path, and as random as they should be."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.ops.dropout import Dropout, child, keep_reference, linear_key, sequence_key, token_keys
from tests.integration.peft_dropout import kept_features
from tests.sampling import examples

PATH = "model.layers.3.mlp.down_proj"
LARGE = st.integers(0, 2**63 - 1)


def keys(seed: int = 1, step: int = 2, sequence: int = 3, positions: range = range(100)) -> torch.Tensor:
    sequences = np.full(len(positions), sequence_key(seed, step, sequence), dtype=np.uint64)
    return torch.from_numpy(token_keys(sequences, np.array(positions)).view(np.int64))


def test_the_generator_gives_the_published_numbers():
    # https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    assert [child(1234567, n) for n in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@settings(max_examples=examples(60))
@given(
    seed=LARGE,
    step=st.integers(0, 10**6),
    sequence=st.integers(0, 5000),
    rate=st.floats(0.001, 0.999),
    start=st.integers(0, 40),
    length=st.integers(1, 9),
    first=st.integers(0, 30),
    features=st.integers(1, 13),
)
def test_every_way_gives_the_definition(seed, step, sequence, rate, start, length, first, features):
    """Whatever part of a sequence is asked for: a chunk of its positions, a shard of the features."""
    positions, columns = range(start, start + length), range(first, first + features)
    dropout = Dropout(rate, linear_key(PATH), first)
    states = keys(seed, step, sequence, positions)
    expected = keep_reference(
        seed, step, sequence, path=PATH, rate=rate, positions=positions, features=columns
    )
    assert dropout.keep(states, features).tolist() == expected
    assert dropout.keep_by_torch(states, features).tolist() == expected
    whole = kept_features(seed, step, sequence, PATH, start + length, first + features, rate)
    assert whole[start:, first:].astype(int).tolist() == expected


def test_blocks_do_not_show():
    states, dropout = keys(positions=range(3000)), Dropout(0.3, 17)
    kept = dropout.keep(states, 90)
    assert torch.equal(kept, dropout.keep_by_torch(states, 90))
    assert torch.equal(kept[1234:1240], dropout.keep(states[1234:1240], 90))


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_the_rate_is_kept_in_every_token_and_feature(rate):
    kept = Dropout(rate, linear_key(PATH)).keep(keys(positions=range(1000)), 1000).double()
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(float(kept.mean()) - (1 - rate)) < 4 * deviation / 1000
    for means in (kept.mean(0), kept.mean(1)):
        # Of a thousand means of a thousand features, the farthest is about 3.3 deviations away.
        assert float((means - (1 - rate)).abs().max()) < 5 * deviation / 1000**0.5
        assert float(means.std()) == pytest.approx(deviation / 1000**0.5, rel=0.1)


def test_masks_of_different_places_are_unrelated():
    paths = [PATH, "model.layers.3.mlp.up_proj", "model.layers.2.mlp.down_proj"]
    masks = [Dropout(0.3, linear_key(path)).keep(keys(), 256) for path in paths]
    masks += [
        Dropout(0.3, linear_key(PATH)).keep(other, 256)
        for other in (keys(seed=2), keys(step=3), keys(sequence=4), keys(positions=range(100, 200)))
    ]
    masks += [masks[0].roll(shift, dim) for dim in (0, 1) for shift in (1, 2, 3, 4)]
    centred = torch.stack([mask.flatten().double() - 0.7 for mask in masks])
    related = centred @ centred.T / (0.21 * centred.shape[1])
    assert float((related - related.diag().diag()).abs().max()) < 5 / centred.shape[1] ** 0.5


def test_parts_put_together_are_the_whole():
    dropout = Dropout(0.2, linear_key(PATH))
    whole = dropout.keep(keys(), 41)
    cuts = [0, 7, 8, 20, 41]
    shards = [Dropout(0.2, linear_key(PATH), a).keep(keys(), b - a) for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat(shards, dim=1), whole)
    chunks = [dropout.keep(keys(positions=range(a, b)), 41) for a, b in pairwise([0, 1, 33, 100])]
    assert torch.equal(torch.cat(chunks), whole)


def test_a_rate_next_to_one_still_has_a_mask():
    kept = Dropout(1 - 1e-9, 5).keep(keys(positions=range(1000)), 1000)
    assert int(kept.sum()) < 100
