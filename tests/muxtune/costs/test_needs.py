"""What a workload needs is what its tasks' graphs run, and nothing else decides its prices."""

import pytest

from muxtune.costs import ProfiledCosts
from muxtune.costs.compose import MicrobatchWork, stage_operators, step_seconds
from muxtune.costs.needs import PLAIN_KINDS, method_kinds, methods_with, needed_kinds
from muxtune.operators import KINDS, Operator
from muxtune.peft import METHODS
from muxtune.peft.lora import LoraSpec
from muxtune.support.errors import UserError
from tests.kinds import KINDS_WITHOUT_BIASES, MEASURED_KINDS
from tests.muxtune.costs.synthetic import MODEL, analytic_law, make_profile, operators


def lora(**options):
    return LoraSpec(**{"method": "lora", "r": 8, "alpha": 8, "targets": ("q_proj",)} | options)


def spec(method, **options):
    return METHODS.get(method).spec.model_validate({"method": method} | options)


SPECS = [
    (lora(), set()),
    (lora(dropout=0.1), {"dropout"}),
    (lora(use_dora=True), {"lora_magnitude"}),
    (lora(use_dora=True, dropout=0.1), {"dropout", "lora_dropped_dora"}),
    (spec("ia3", targets=["k_proj"]), {"ia3"}),
    (spec("prompt_tuning", num_virtual_tokens=4), {"prompt"}),
    (spec("prefix_tuning", num_virtual_tokens=4), {"prefix"}),
    (lora(layers=(5,)), set()),
]


@pytest.mark.parametrize(("peft", "kinds"), SPECS, ids=lambda each: getattr(each, "method", ""))
def test_needed_kinds_are_those_that_the_graphs_have(peft, kinds):
    needed = needed_kinds([peft], MODEL)
    assert needed == PLAIN_KINDS | kinds
    work = MicrobatchWork(tokens=64, task_tokens=(64,), pefts=(peft,), attention=((1.0, 4, 16),), targets=16)
    ran = set()
    for phase in ("fwd", "bwd"):
        for op, _ in stage_operators(MODEL, 8, first=True, last=True, work=work, phase=phase):
            ran.add(op.kind)
    assert ran - PLAIN_KINDS == kinds


def test_tasks_need_what_each_of_them_needs():
    pefts = [peft for peft, _ in SPECS]
    assert needed_kinds(pefts, MODEL) == frozenset().union(*(needed_kinds([peft], MODEL) for peft in pefts))
    assert needed_kinds([], MODEL) == PLAIN_KINDS


def test_all_methods_need_all_that_is_measured():
    assert method_kinds(METHODS.names()) == set(MEASURED_KINDS)
    assert method_kinds([]) == PLAIN_KINDS
    with pytest.raises(UserError, match="no PEFT method named 'lara'"):
        method_kinds(["lara"])


@pytest.mark.parametrize("kind", sorted(set(MEASURED_KINDS) - PLAIN_KINDS - KINDS_WITHOUT_BIASES))
def test_the_named_methods_bring_the_kind(kind):
    names = methods_with([kind])
    assert len(names) == 1
    assert kind in method_kinds(names)
    assert methods_with(PLAIN_KINDS) == []


def test_prices_and_identity_do_not_depend_on_what_else_was_measured():
    """A profile of everything and one of just what is needed give bitwise the same costs."""
    law = analytic_law()

    def uneven(op, phase):
        return law(op, phase) * (3.0 if op.kind not in PLAIN_KINDS else 1.0 + 0.1 * (op.dims[-1] % 7))

    kinds = ("ia3", "prompt", "prefix")
    others = [Operator(kind, dims) for kind in kinds for dims in KINDS[kind].grid(MODEL, True)]
    plain = [op for op in operators() if op.kind in PLAIN_KINDS]
    needed = needed_kinds([lora()], MODEL)
    lean = ProfiledCosts(make_profile(uneven, plain), MODEL)
    rich = ProfiledCosts(make_profile(uneven, [*operators(), *others]), MODEL)
    part = rich.of_kinds(needed)
    assert lean.of_kinds(needed) is lean
    assert rich.ref.digest != lean.ref.digest
    assert part.ref == lean.ref
    assert part.analytic.coefficients == lean.analytic.coefficients
    sizes = {"linear": (256, 512, 100), "lora": (256, 256, 8, 90), "norm": (77,)}
    for op in (Operator(kind, dims) for kind, dims in sizes.items()):
        for phase in ("fwd", "bwd"):
            assert part.latency_s(op, phase) == lean.latency_s(op, phase) == rich.latency_s(op, phase)
            assert part.shard(2).latency_s(op, phase) == lean.shard(2).latency_s(op, phase)
    assert step_seconds(part, MODEL, 4, lora()) == step_seconds(lean, MODEL, 4, lora())
    with pytest.raises(UserError, match="no fwd measurement of kind ia3"):
        part.latency_s(others[0], "fwd")
