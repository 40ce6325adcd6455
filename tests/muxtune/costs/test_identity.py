"""The identity of costs of one's own: their class, plain settings and prices, and nothing else."""

from __future__ import annotations

from muxtune.costs.identity import own_ref, samples
from muxtune.costs.ref import CostsRef
from muxtune.operators import KINDS
from muxtune.support.errors import UserError

BASE = CostsRef(profile_id="base", device="cpu", digest="0" * 64)


class Scaled:
    def __init__(self, factor: float = 2.0, note: str = "") -> None:
        self.factor = factor
        self._note = note
        self.tables = [1, 2, 3]  # no plain setting: what it changes shows in prices


class Other(Scaled):
    pass


def digest(costs: object, price=lambda op, phase: 1.0, base: CostsRef = BASE) -> str:
    return own_ref(costs, base, price).digest


def test_it_says_what_it_begins_with_and_whose_it_is():
    ref = own_ref(Scaled(), BASE, lambda op, phase: 1.0)
    assert ref.profile_id == f"base+Scaled-{ref.digest[:12]}"
    assert ref.device == "cpu"


def test_equal_costs_have_one_identity_and_private_values_are_no_part_of_it():
    assert digest(Scaled()) == digest(Scaled(note="kept for later"))


def test_class_settings_prices_and_beginning_tell_costs_apart():
    def dear(op, phase):
        return 2.0 if (op.kind, phase) == ("norm", "bwd") else 1.0

    def without_links(op, phase):
        if op.kind == "p2p":
            raise UserError("nobody measured it")
        return 1.0

    longer = BASE.model_copy(update={"digest": "1" * 64})
    found = [
        digest(Scaled()),
        digest(Other()),
        digest(Scaled(3.0)),
        digest(Scaled(), dear),
        digest(Scaled(), without_links),
        digest(Scaled(), base=longer),
    ]
    assert len(set(found)) == len(found)


def test_every_kind_that_has_a_price_is_sampled():
    kinds = {op.kind for op in samples()}
    assert {"linear", "lora", "ia3", "bottleneck", "all_reduce", "p2p"} <= kinds
    assert {name for name, kind in KINDS.items() if kind.work is not None} <= kinds
    assert all(len(op.dims) == len(KINDS[op.kind].dims) for op in samples())
