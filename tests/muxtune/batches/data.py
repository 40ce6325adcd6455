"""Tasks with examples of given lengths, and their steps one by one."""

import numpy as np

from muxtune.batches import (
    deal_sequences,
    group_tokens,
)
from muxtune.data.histograms import load_length_histogram
from muxtune.tasks import Example, TaskData
from tests.plans import make_task


def make_data(lengths, *, batch=4, steps=5, shuffle=False, max_length=512, seed=1, micro=1):
    task = make_task(
        "t",
        global_batch_size=batch,
        micro_batch_size=micro,
        steps=steps,
        shuffle=shuffle,
        max_length=max_length,
        seed=seed,
    )
    return TaskData(task, [Example(np.zeros(length, dtype=np.int64), 1) for length in lengths])


def sizes_of_each_step(data, alignment, microbatches, row_tokens):
    """Tokens of each group of a task, step by step, ``[steps, m]``."""
    rows = []
    for step in range(data.task.steps):
        lengths = data.batch_lengths(step)
        groups = deal_sequences(lengths, alignment, microbatches)
        rows.append(group_tokens(lengths, groups, alignment, row_tokens))
    return np.array(rows)


def real_lengths(name, n, seed):
    drawn = load_length_histogram(name).sample(np.random.default_rng(seed), n)
    return np.minimum(drawn, 256)
