"""Lines between the processes of a session."""

import pytest

from muxtune.costs.profile import ClockReading, Overlap
from muxtune.graph.attention_backends import AttentionContest, AttentionTime
from muxtune.graph.operators import Operator
from profiler.devices import Description
from profiler.timing import Sample
from profiler.worker_protocol import Reading, read_line, write_line

LINES = [
    Reading(Operator("linear", (256, 512, 64)), "bwd", Sample(1.25e-3, 1e-3, 0.1 + 0.2, 17)),
    Description(processor="a\nb", versions={"mkl": "2024"}, settings={}),
    Overlap(tokens=64, calls=3, compute_s=0.1 + 0.2, communication_s=0.1, both_s=0.37),
    ClockReading(rank=3, moment="after", mhz={"sm": 1410.5}, throttled_by=("power cap",)),
    AttentionContest(
        streams=((8, 16), (32,)),
        times=(
            AttentionTime(backend="grouped", fwd_s=(0.1, 0.2), bwd_s=(0.3, 0.1 + 0.2)),
            AttentionTime(backend="varlen", missing="a CUDA device"),
        ),
        chosen="grouped",
    ),
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: type(line).__name__)
def test_a_line_survives_its_way(line):
    text = write_line(line)
    assert "\n" not in text
    assert read_line(text) == line
