from __future__ import annotations

import numpy as np
import pytest
import torch

from muxtune.batches import HTaskShape, layout_step
from muxtune.tasks import Example
from runtime.attention.carried_kv import CarriedKv
from runtime.data.batch import build_microbatch

EXAMPLES = [
    [Example(np.array([11, 12, 13]), 2), Example(np.array([21, 22, 23, 24, 25]), 1)],
    [Example(np.array([31, 32]), 1)],
]


def build(shape, lengths, examples=EXAMPLES):
    layouts = layout_step(shape, [np.array(each) for each in lengths])
    return [build_microbatch(layout, examples, task_ids=("a", "b")) for layout in layouts]


def test_padded_micro_batch_by_hand():
    shape = HTaskShape(alignment="pad", row_tokens=6, microbatches=1, tokens=18)
    (batch,) = build(shape, ([3, 5], [2]))
    assert batch.tokens_T.tolist() == [11, 12, 13, 0, 0, 0, 21, 22, 23, 24, 25, 0, 31, 32, 0, 0, 0, 0]
    assert batch.positions_T.tolist() == [*range(6)] * 3
    assert batch.target_rows_N.tolist() == [1, 6, 7, 8, 9, 12]
    assert batch.target_ids_N.tolist() == [13, 22, 23, 24, 25, 32]
    assert batch.target_spans == ((0, 5), (5, 6))
    assert batch.task_ids == ("a", "b")


def test_packed_micro_batch_by_hand():
    shape = HTaskShape(alignment="pack", row_tokens=None, microbatches=1, tokens=13)
    (batch,) = build(shape, ([3, 5], [2]))
    assert batch.tokens_T.tolist() == [11, 12, 13, 21, 22, 23, 24, 25, 31, 32, 0, 0, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 0, 0, 0]
    assert batch.target_rows_N.tolist() == [1, 3, 4, 5, 6, 8]


def test_a_finished_task_has_left_and_an_empty_one_has_no_targets():
    shape = HTaskShape(alignment="pad", row_tokens=6, microbatches=2, tokens=12)
    first, second = build(shape, ([], [2]), [[], EXAMPLES[1]])
    assert first.task_ids == second.task_ids == ("b",)
    assert first.tokens_T.tolist() == [31, 32] + [0] * 10
    assert second.target_spans == ((0, 0),)
    assert second.target_rows_N.dtype == torch.int64


def dropout_keys(shape, lengths, examples):
    """States of every token by task, sequence and position, of all micro-batches."""
    found = {}
    layouts = layout_step(shape, lengths)
    for number, layout in enumerate(layouts):
        batch = build_microbatch(
            layout,
            examples,
            task_ids=("a", "b"),
            carried=CarriedKv() if shape.carry > 1 else None,
            earlier=layouts[number - number % shape.carry : number],
            dropout_seeds={0: 5, 1: 6},
            step=3,
        )
        for s in layout.segments:
            for i in range(s.length):
                found[s.task, s.sequence, s.offset + i] = int(batch.dropout_keys_T[s.start + i])
    return found


def test_states_of_dropout_depend_on_the_place_in_the_sequence_alone():
    """Not on alignment, number of micro-batches, chunks, carry groups and replicas."""
    generator = np.random.default_rng(0)
    lengths = [generator.integers(2, 40, n) for n in (12, 5)]
    examples = [[Example(np.zeros(n, dtype=np.int64), 1) for n in each] for each in lengths]
    shapes = [
        HTaskShape(alignment="pack", row_tokens=None, microbatches=1, tokens=600),
        HTaskShape(alignment="pack", row_tokens=None, microbatches=2, tokens=400, replicas=2),
        HTaskShape(alignment="pad", row_tokens=40, microbatches=3, tokens=400),
        HTaskShape(alignment="chunk", row_tokens=16, microbatches=2, tokens=600),
        HTaskShape(alignment="chunk", row_tokens=8, microbatches=4, tokens=600, carry=2, replicas=2),
    ]
    expected, *others = (dropout_keys(shape, lengths, examples) for shape in shapes)
    assert all(other == expected for other in others)
    assert len(set(expected.values())) == len(expected) == sum(map(int, np.concatenate(lengths)))


def test_there_are_no_states_where_no_task_of_the_micro_batch_has_dropout():
    shape = HTaskShape(alignment="pack", row_tokens=None, microbatches=1, tokens=13)
    (layout,) = layout_step(shape, [np.array([3, 5]), np.array([], dtype=np.int64)])
    for seeds, there in (({}, False), ({1: 4}, False), ({0: 4}, True)):
        batch = build_microbatch(layout, [EXAMPLES[0], []], task_ids=("a", "b"), dropout_seeds=seeds)
        assert (batch.dropout_keys_T is not None) == there


@pytest.mark.parametrize("alignment", ["pad", "pack", "chunk"])
def test_every_target_is_predicted_from_the_position_before_it(alignment):
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 20, 30)
    examples = [Example(generator.integers(0, 99, n), int(generator.integers(1, n))) for n in lengths]
    row = None if alignment == "pack" else 20
    shape = HTaskShape(alignment=alignment, row_tokens=row, microbatches=3, tokens=300)
    total = 0
    for batch in build(shape, [lengths], [examples]):
        following = batch.tokens_T[batch.target_rows_N + 1]
        assert torch.equal(following, batch.target_ids_N)
        position = batch.positions_T[batch.target_rows_N]
        assert torch.equal(batch.positions_T[batch.target_rows_N + 1], position + 1)
        total += len(following)
    assert total == sum(example.target_tokens for example in examples)
