"""The alignment report against streams that are laid out step by step."""

from __future__ import annotations

import numpy as np
import pytest

from muxtune.batches import HTaskShape, alignment_report, effective_tokens, layout_step, measure_shape
from muxtune.batches.token_report import smallest_chunk
from muxtune.model import PRESETS
from muxtune.tasks import DatasetSpec, TaskData, load_task_data
from tests.plans import make_task

LLAMA = PRESETS["llama-tiny"]


@pytest.fixture(scope="module")
def data() -> dict[str, TaskData]:
    tasks = [
        make_task("short", max_length=64),
        make_task("medium", max_length=128, dataset=DatasetSpec(lengths="openbookqa")),
        make_task("long", max_length=256, dataset=DatasetSpec(lengths="rte"), micro_batch_size=2),
    ]
    return {task.id: load_task_data(task, LLAMA) for task in tasks}


def laid_out(data: dict[str, TaskData], ids: tuple[str, ...], shape: HTaskShape) -> tuple[int, float]:
    """Tokens of one step's streams, and the examples' in them, mean over the steps."""
    effective = []
    for step in range(4):
        layouts = layout_step(shape, [data[task_id].batch_lengths(step) for task_id in ids])
        assert len(layouts) == shape.groups
        effective.append(sum(layout.effective_tokens for layout in layouts))
    return sum(layout.tokens for layout in layouts), float(np.mean(effective))


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("alignment", ["pad", "pack", "chunk"])
def test_a_report_counts_what_layouts_hold(data, alignment, replicas):
    htasks = []
    for ids in (("short", "long"), ("medium",)):
        chunk = 256 if alignment == "chunk" else None
        members = [data[task_id] for task_id in ids]
        m = max(each.task.declared_microbatches for each in members)
        measured = measure_shape(members, alignment, chunk_tokens=chunk, microbatches=m)
        shape = HTaskShape(
            alignment=alignment,
            row_tokens=measured.row_tokens,
            microbatches=m // replicas,
            tokens=measured.tokens,
            replicas=replicas,
        )
        htasks.append((ids, shape))
    report = alignment_report(data, htasks, chunk_tokens=256)
    totals = [laid_out(data, ids, shape) for ids, shape in htasks]
    assert report.plan.all == sum(tokens for tokens, _ in totals)
    assert report.plan.effective == pytest.approx(sum(effective for _, effective in totals))
    assert report.plan.billed == 8 * (64 + 128 + 256)
    assert getattr(report, alignment) == report.plan
    assert report.chunk_tokens == (256, 256)
    for counts in (report.plan, report.pad, report.pack, report.chunk):
        assert counts.ineffective == pytest.approx(counts.all - counts.effective)
        assert (counts.effective, counts.billed) == (report.plan.effective, report.plan.billed)


def test_padding_needs_most_and_packing_least(data):
    ids = tuple(data)
    members = list(data.values())
    report = alignment_report(data, [(ids, measure_shape(members, "pack"))])
    assert report.chunk_tokens == (256,)
    assert report.pack.all < report.chunk.all < report.pad.all
    assert report.pad.all == 3 * 8 * 256
    assert report.pack.all >= report.pack.effective


def test_a_chunk_that_is_too_short_for_an_htask_is_not_taken_for_it(data):
    htasks = [((task_id,), measure_shape([data[task_id]], "pack")) for task_id in ("short", "long")]
    report = alignment_report(data, htasks, chunk_tokens=64)
    longest = int(data["long"].lengths.max())
    assert report.chunk_tokens == (64, smallest_chunk([data["long"]]))
    assert longest <= report.chunk_tokens[1] < 2 * longest


def test_known_shapes_are_not_measured_again(data):
    asked = []

    def measure(ids, alignment, chunk_tokens, groups):
        asked.append((ids, alignment, chunk_tokens, groups))
        return 1000

    shape = measure_shape([data["short"]], "pack")
    report = alignment_report(data, [(("short",), shape)], chunk_tokens=128, measure=measure)
    assert asked == [(("short",), "pad", None, 2), (("short",), "chunk", 128, 2)]
    assert (report.pad.all, report.pack.all, report.chunk.all) == (2000, 2 * shape.tokens, 2000)


def test_effective_tokens_are_the_mean_over_the_steps(data):
    expected = [np.mean([each.batch_lengths(k).sum() for k in range(4)]) for each in data.values()]
    assert effective_tokens(data.values()) == pytest.approx(sum(expected))
