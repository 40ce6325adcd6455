"""The grouped kernels in triton's interpreter, against autograd of the plain formula in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from muxtune.batches import Span
from runtime.ops.dropout import Dropout, linear_key, token_keys
from runtime.ops.kernels import kernels
from runtime.peft.lora import LoraPair, lora_linear
from runtime.peft.lora_reference import lora_linear_reference


@dataclass(frozen=True)
class Case:
    """Tasks on one linear; every task has a pair on each range of columns."""

    spans: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    columns: tuple[tuple[int, int], ...] = ((0, 48), (48, 80))
    in_features: int = 64
    dtype: torch.dtype = torch.float32
    factor_dtype: torch.dtype = torch.float32
    rates: tuple[float, ...] = ()
    """Dropout of each task; none has any if empty."""
    poisoned: tuple[int, ...] = ()
    """Tasks that hold NaN and infinity in everything of theirs."""


@dataclass(frozen=True)
class Gradients:
    """What a linear adds up or computes; factors are A and B by task, then columns."""

    y: Tensor
    dx: Tensor
    factors: list[Tensor]


RAGGED = Case(
    # A whole tile and 6 tokens; nobody; a single token; two tiles; one token more than two tiles.
    spans=((0, 70), (70, 70), (70, 71), (71, 199), (203, 332)),
    ranks=(1, 5, 3, 64, 8),
)
CASES = {
    "ragged spans, ranks 1 to 64": RAGGED,
    "odd widths": replace(RAGGED, in_features=75, columns=((0, 31), (37, 50))),
    "ranks beyond and between tiles": Case(spans=((0, 9), (9, 80)), ranks=(16, 33)),
    "inputs summed in parts": Case(spans=((0, 5), (5, 75)), ranks=(8, 1), in_features=2100),
    "one task with one token": Case(spans=((2, 3),), ranks=(3,), columns=((0, 16),)),
    "more tasks than anybody runs": Case(
        # 70 tasks, every third of them without tokens, and ranks that fill no tile.
        spans=tuple((3 * i, 3 * i + (0 if i % 3 == 2 else 3)) for i in range(70)),
        ranks=tuple((1, 3, 8, 17, 64)[i % 5] for i in range(70)),
        columns=((0, 16),),
        in_features=32,
    ),
    "dropout of some tasks": replace(RAGGED, rates=(0.5, 0.5, 0.3, 0.1, 0.0)),
    "dropout of inputs summed in parts": Case(
        spans=((0, 5), (5, 75)), ranks=(17, 1), in_features=2100, rates=(0.9, 0.0)
    ),
    "dropout on odd widths": replace(
        RAGGED, in_features=75, columns=((0, 31), (37, 50)), rates=(0.2, 0.0, 0.5, 0.4, 0.7)
    ),
    "the same columns twice, dropped": Case(
        spans=((0, 20),), ranks=(4,), columns=((0, 16), (0, 16)), rates=(0.5,)
    ),
    "the same columns twice": Case(spans=((0, 20),), ranks=(4,), columns=((0, 16), (0, 16))),
}

# The interpreter truncates where a GPU rounds to nearest, hence twice the rounding of bfloat16's 8 bits. With
# factors of bfloat16 the down projection is rounded too, before the sum over ranks.
BF16 = 2**-7
FP16 = 2**-10
TOLERANCES = {
    (torch.float32, torch.float32): (1e-5, 1e-5),  # float32 through sums of up to 2100 terms
    (torch.bfloat16, torch.float32): (BF16, 1e-5),
    (torch.bfloat16, torch.bfloat16): (2 * BF16, 2 * BF16),
    (torch.float16, torch.float32): (FP16, 1e-5),
    (torch.float16, torch.float16): (2 * FP16, 2 * FP16),
}
"""Of activations and of factors, relative to the largest element."""


def draw(case: Case):
    """x, y, gradient of y, dx so far, pieces, factors."""
    torch.manual_seed(0)
    tokens, outputs = case.spans[-1][1] + 5, max(last for _, last in case.columns) + 3
    x, dx = (torch.randn(tokens, case.in_features).to(case.dtype) for _ in range(2))
    y, grad = (torch.randn(tokens, outputs).to(case.dtype) for _ in range(2))
    pieces, factors = [], []
    for task, ((start, stop), rank) in enumerate(zip(case.spans, case.ranks, strict=True)):
        for first, last in case.columns:
            a = torch.randn(rank, case.in_features).to(case.factor_dtype)
            b = torch.randn(last - first, rank).to(case.factor_dtype)
            if task in case.poisoned:
                a[0], b[-1] = float("nan"), float("inf")
            if start < stop:
                pieces.append((start, stop, first, last, 0.25 * (task + 1)))
                factors += [a, b]
        if task in case.poisoned:
            x[start], dx[stop - 1], y[start], grad[stop - 1] = (float("nan"),) * 4
            x[stop - 1], grad[start] = float("inf"), float("-inf")
    return x, y, grad, dx, pieces, factors


def keys_of(case: Case) -> Tensor:
    """States of the tokens, spread over all bits."""
    return torch.from_numpy(token_keys(np.uint64(5), np.arange(case.spans[-1][1] + 5)).view(np.int64))


def dropouts_of(case: Case, pieces) -> tuple[Dropout | None, ...]:
    """Dropout of each piece; a rank's features begin in the midst of four that share a number."""
    of_spans = dict(zip(case.spans, case.rates or [0.0] * len(case.spans), strict=True))
    rates = [of_spans[piece[:2]] for piece in pieces]
    return tuple(
        Dropout(rate, linear_key(str(i)), first_feature=3) if rate else None for i, rate in enumerate(rates)
    )


def run_kernels(case: Case) -> Gradients:
    from runtime.ops.kernels.grouped_lora import (
        Masks,
        add_input_gradients_,
        add_updates_,
        factor_gradients,
    )

    x, y, grad, dx, pieces, factors = draw(case)
    masks = Masks(keys_of(case), dropouts_of(case, pieces)) if case.rates else None
    down = add_updates_(y, x, pieces, factors, masks)
    ddown = add_input_gradients_(grad, dx, pieces, factors, masks)
    return Gradients(y, dx, factor_gradients(grad, x, pieces, factors, down, ddown, masks))


def run_formula(case: Case) -> Gradients:
    x, y, grad, dx, pieces, factors = draw(case)
    x = x.double().requires_grad_()
    factors = [factor.double().requires_grad_() for factor in factors]
    updates = torch.zeros(y.shape, dtype=torch.float64)
    dropouts, keys = dropouts_of(case, pieces), keys_of(case)
    for i, (start, stop, first, last, scale) in enumerate(pieces):
        a, b = factors[2 * i : 2 * i + 2]
        read = x[start:stop]
        if dropouts[i] is not None:
            read = read * dropouts[i].keep_by_torch(keys[start:stop], case.in_features)
        update = scale * read @ a.t() @ b.t()
        rows = (start, len(x) - stop)
        updates = updates + torch.nn.functional.pad(update, (first, y.shape[1] - last, *rows))
    x_grad, *factor_grads = torch.autograd.grad(updates, [x, *factors], grad.double())
    return Gradients((y.double() + updates).detach(), dx.double() + x_grad, factor_grads)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("dtype", "factor_dtype"), TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients_equal_the_formula_in_float64(interpreted, case, dtype, factor_dtype):
    case = replace(case, dtype=dtype, factor_dtype=factor_dtype)
    actual, expected = interpreted(run_kernels, case), run_formula(case)
    activations, factors = TOLERANCES[dtype, factor_dtype]
    assert actual.y.dtype == actual.dx.dtype == dtype
    assert_close(actual.y, expected.y, activations)
    assert_close(actual.dx, expected.dx, activations)
    for a, b in zip(actual.factors, expected.factors, strict=True):
        assert a.dtype == factor_dtype
        assert_close(a, b, factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_task_holds_reaches_no_other(interpreted, dtype):
    """NaN and infinity in a task's tokens, gradients and factors leave all others bitwise as they were."""
    case = replace(RAGGED, dtype=dtype)
    clean, poisoned = interpreted(run_kernels, case), interpreted(run_kernels, replace(case, poisoned=(2, 3)))
    others = [0, 4]
    for start, stop in [*(case.spans[task] for task in others), (199, 203), (332, 337)]:
        assert torch.equal(clean.y[start:stop], poisoned.y[start:stop])
        assert torch.equal(clean.dx[start:stop], poisoned.dx[start:stop])
    present = [task for task, (start, stop) in enumerate(case.spans) if start < stop for _ in range(4)]
    for task, a, b in zip(present, clean.factors, poisoned.factors, strict=True):
        assert torch.equal(a, b) if task in others else b.isnan().any()


def run_in_a_hole(case: Case):
    """Kernels on views into larger tensors whose other elements are NaN; both views and surroundings."""
    from runtime.ops.kernels.grouped_lora import add_input_gradients_, add_updates_, factor_gradients

    x, y, grad, dx, pieces, factors = draw(case)
    whole, inside = [], []
    for tensor in (x, y, grad, dx):
        around = torch.full((len(tensor) + 64, tensor.shape[1] + 32), float("nan"), dtype=tensor.dtype)
        view = around[32:-32, 16:-16]
        view.copy_(tensor)
        # Rows of nobody: between the tasks and behind them.
        held = torch.zeros(len(tensor), dtype=torch.bool)
        for start, stop in case.spans:
            held[start:stop] = True
        view[~held] = float("nan")
        whole.append(around)
        inside.append(view)
    x, y, grad, dx = inside
    before = [around.clone() for around in whole]
    down = add_updates_(y, x, pieces, factors)
    ddown = add_input_gradients_(grad, dx, pieces, factors)
    found = Gradients(y.clone(), dx.clone(), factor_gradients(grad, x, pieces, factors, down, ddown))
    for view in inside:
        view[held] = 0.0
    after, untouched = [around.clone() for around in whole], []
    for old, new in zip(before, after, strict=True):
        old[32:-32, 16:-16][held] = 0.0
        untouched.append(torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0)))
    return found, untouched, held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_poisoned_memory_around_the_tasks_is_neither_read_nor_written(interpreted, dtype):
    """NaN in rows of nobody, and in all that lies before, behind and beside the tensors."""
    case = replace(RAGGED, dtype=dtype)
    found, untouched, held = interpreted(run_in_a_hole, case)
    plain = interpreted(run_kernels, case)
    assert untouched == [True] * 4
    assert torch.equal(found.y[held], plain.y[held])
    assert torch.equal(found.dx[held], plain.dx[held])
    assert all(torch.equal(a, b) for a, b in zip(found.factors, plain.factors, strict=True))
    assert not found.y[~held].isfinite().any()


def run_alone_and_together() -> list[tuple[Tensor, Tensor]]:
    from runtime.ops.kernels.grouped_lora import add_input_gradients_, add_updates_, factor_gradients

    case = replace(RAGGED, in_features=1100)
    results = []
    for keep in (slice(None), slice(6, 8)):  # all pieces; those of the last task but one
        x, y, grad, dx, pieces, factors = draw(case)
        if keep != slice(None):
            pieces, factors = pieces[4:6], factors[8:12]
        down = add_updates_(y, x, pieces, factors)
        ddown = add_input_gradients_(grad, dx, pieces, factors)
        grads = factor_gradients(grad, x, pieces, factors, down, ddown)
        start, stop = case.spans[3]
        results.append([y[start:stop], dx[start:stop], *(grads if len(grads) == 4 else grads[8:12])])
    return list(zip(*results, strict=True))


def test_a_task_is_bitwise_the_same_alone_and_in_company(interpreted):
    for together, alone in interpreted(run_alone_and_together):
        assert torch.equal(together, alone)


def run_linear(mode: str, dtype: torch.dtype, needs_input_gradient: bool, dropping: tuple[int, ...] = ()):
    """A frozen linear with adapters, as a stage calls it; the frozen product is the same in both modes."""
    torch.manual_seed(0)
    spans = [Span(0, 0, 30), Span(1, 30, 30), Span(2, 30, 101), Span(3, 101, 110)]
    x = torch.randn(112, 64).to(dtype).requires_grad_(needs_input_gradient)
    weight, bias = torch.randn(96, 64).to(dtype), torch.randn(96).to(dtype)
    adapters = [
        [
            LoraPair(
                torch.randn(r, 64, requires_grad=True),
                torch.randn(last - first, r, requires_grad=True),
                0.5 * r,
                (first, last),
            )
            for first, last in columns
        ]
        for r, columns in (
            (1, [(0, 32), (64, 96)]),
            (2, [(0, 32)]),
            (8, [(0, 32), (32, 64), (64, 96)]),
            (3, []),
        )
    ]
    factors = [t for span, pairs in zip(spans, adapters, strict=True) if span.start < span.stop
               for pair in pairs for t in (pair.a_RI, pair.b_OR)]  # fmt: skip
    wanted = [x, *factors] if needs_input_gradient else factors
    keys = torch.arange(len(x), dtype=torch.int64)
    for task in dropping:
        adapters[task] = [
            replace(pair, dropout=Dropout(0.3, 10 * task + i)) for i, pair in enumerate(adapters[task])
        ]
    if mode == "reference":
        y = lora_linear_reference(x, weight, bias, spans[:3], adapters[:3], keys)
        y = torch.cat((y, torch.nn.functional.linear(x[101:], weight, bias)))
        return [y.detach(), *torch.autograd.grad(y.sum(), wanted)]
    with kernels(mode):
        y = lora_linear(x, weight, bias, spans, adapters, dropout_keys_T=keys)
    # The gradient of a sum is broadcast: it has no memory of its own.
    return [y.detach(), *torch.autograd.grad(y.sum(), wanted)]


@pytest.mark.parametrize("needs_input_gradient", [True, False])
def test_a_linear_takes_the_kernels_and_equals_its_reference(interpreted, needs_input_gradient):
    arguments = (torch.float32, needs_input_gradient)
    actual = interpreted(run_linear, "triton", *arguments)
    for a, b in zip(actual, run_linear("reference", *arguments), strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("dropping", [(2,), (0, 2)])
def test_adapters_with_dropout_share_the_launches(interpreted, dropping):
    """With those of other tasks, which have none."""
    arguments = (torch.float32, True, dropping)
    actual = interpreted(run_linear, "triton", *arguments)
    for a, b in zip(actual, run_linear("reference", *arguments), strict=True):
        assert_close(a, b, 1e-5)


def test_with_bfloat16_activations_both_paths_of_a_linear_agree(interpreted):
    arguments = (torch.bfloat16, True)
    actual, plain = interpreted(run_linear, "triton", *arguments), run_linear("torch", *arguments)
    for a, b in zip(actual, plain, strict=True):
        assert a.dtype == b.dtype
        assert_close(a.double(), b.double(), 2 * BF16)


def run_with_odd_dtypes() -> str:
    from runtime.ops.kernels.grouped_lora import add_updates_

    x = torch.randn(4, 16)
    factors = [torch.randn(2, 16), torch.randn(16, 2, dtype=torch.float64)]
    with pytest.raises(ValueError, match="expected one dtype, that or float32") as caught:
        add_updates_(x.clone(), x, [(0, 4, 0, 16, 1.0)], factors)
    return str(caught.value)


def test_factors_of_several_dtypes_are_refused(interpreted):
    assert "float64" in interpreted(run_with_odd_dtypes)
