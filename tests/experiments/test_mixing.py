"""What mixing methods buys: never less than nothing, and nothing where there is one method."""

from __future__ import annotations

import pytest

from experiments.mixing import draw_mixing, measure_mixing, mixing_table


def test_mixing_costs_nothing_and_is_drawn(tmp_path):
    one, two = measure_mixing("testbed-a", "llama2-7b", 4, [1, 2])
    assert one.gain == pytest.approx(1.0)
    assert one.mixed_htasks == one.apart_htasks
    assert two.gain >= 1 - 1e-9
    assert two.apart_htasks >= 2
    assert mixing_table([one, two]).count("\n") >= 3
    draw_mixing([one, two], tmp_path / "m.png", title="two")
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
