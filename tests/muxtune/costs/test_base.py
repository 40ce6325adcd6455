"""What costs of one's own get for nothing."""

from __future__ import annotations

import numpy as np

from muxtune.operators import Operator
from tests.muxtune.graph.works import LLAMA, Rates


def test_products_at_many_sizes_are_those_of_each():
    costs = Rates(LLAMA)
    found = costs.linear_latencies_s(256, 512, np.array([8, 64, 8]), "bwd")
    expected = [costs.latency_s(Operator("linear", (256, 512, n)), "bwd") for n in (8, 64, 8)]
    assert found.tolist() == expected


def test_nothing_is_doubtful_and_adapters_run_alike():
    costs = Rates(LLAMA)
    with costs.noting() as notes:
        costs.latency_s(Operator("norm", (8,)), "fwd")
    assert notes == []
    assert costs.with_adapters("separate") is costs
