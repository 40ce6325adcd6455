"""Lines between the processes of a session."""

import pytest

from muxtune.costs.profile import ClockReading
from muxtune.operators import Operator
from profiler.devices import Description
from profiler.lines import Reading, read_line, write_line
from profiler.timing import Sample

LINES = [
    Reading(Operator("linear", (256, 512, 64)), "bwd", Sample(1.25e-3, 1e-3, 0.1 + 0.2, 17)),
    Description(processor="a\nb", versions={"mkl": "2024"}, settings={}),
    ClockReading(rank=3, moment="after", mhz={"sm": 1410.5}, throttled_by=("power cap",)),
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: type(line).__name__)
def test_a_line_survives_its_way(line):
    text = write_line(line)
    assert "\n" not in text
    assert read_line(text) == line
