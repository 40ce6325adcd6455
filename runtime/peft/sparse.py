"""Sparse differences of frozen weights: ``y += S x`` for the rows of each task on a linear."""

# T tokens of the stream, t of one task, I features in, O features out, N entries of a difference

# Sparse products work on features times tokens. Turning a stream's rows there and back takes longer than the
# product where few entries are trained (512 tokens, 1 311 entries of 256 x 256: 110 of 170 us), so what
# several linears of a task read is turned once, and sums are turned back whole.

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from muxtune.batches import Span
from runtime.peft.adapter import Frozen, TaskAdapter
from runtime.peft.frozen_linear import Saved
from runtime.peft.method import Content, Run

_SPARSE_CPU = torch.backends.mkl.is_available()
"""Whether torch has sparse products on a CPU; without, the difference is spread out for each."""


def draw_places(rows: int, columns: int, count: int, seed: int) -> Tensor:
    """Places of random entries of a matrix, ``[2, count]`` by rows, as peft's SHiRA draws them.

    Torch's global generator stays as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    flat_N = torch.randperm(rows * columns, generator=generator)[:count].sort().values
    return torch.stack([flat_N // columns, flat_N % columns]).int()


class Pattern:
    """Where the entries of a difference are: compressed rows of it and of its transpose.

    Args:
        places_2N: Rows and columns, no two alike.
        rows: Rows of the matrix.
        columns: Its columns.
    """

    def __init__(self, places_2N: Tensor, rows: int, columns: int) -> None:
        self.shape = (rows, columns)
        row_N, column_N = places_2N
        self._rows = _compressed(row_N, column_N, rows, columns)
        self._columns = _compressed(column_N, row_N, columns, rows)
        with warnings.catch_warnings():  # which torch gives once
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)

    def matrix(self, values_N: Tensor) -> Tensor:
        """The difference, sparse."""
        starts, others_N, order_N = self._rows
        return _csr(starts, others_N, _ordered(values_N, order_N), self.shape)

    def transposed(self, values_N: Tensor) -> Tensor:
        """Its transpose, sparse."""
        starts, others_N, order_N = self._columns
        return _csr(starts, others_N, _ordered(values_N, order_N), self.shape[::-1])

    def product_at_places(self, grad_Ot: Tensor, x_It: Tensor) -> Tensor:
        """Entries of ``grad x^T``, ``[N]``."""
        starts, others_N, order_N = self._rows
        if x_It.is_cuda or _SPARSE_CPU:
            zeros = _csr(starts, others_N, x_It.new_zeros(len(others_N)), self.shape)
            sorted_N = torch.sparse.sampled_addmm(zeros, grad_Ot, x_It.t(), beta=0.0).values()
        else:
            rows_N = torch.repeat_interleave(starts.diff())
            sorted_N = (grad_Ot @ x_It.t())[rows_N, others_N]
        return sorted_N if order_N is None else torch.empty_like(sorted_N).index_copy_(0, order_N, sorted_N)


def _ordered(values_N: Tensor, order_N: Tensor | None) -> Tensor:
    return values_N if order_N is None else values_N.index_select(0, order_N)


def _csr(starts: Tensor, others_N: Tensor, values_N: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts, others_N, values_N, shape, check_invariants=False)


_Compressed = tuple[Tensor, Tensor, Tensor | None]
"""Starts of rows and columns of entries, 32-bit as libraries have them; and which entries these are, None if
they have that order already."""


def _compressed(row_N: Tensor, column_N: Tensor, rows: int, columns: int) -> _Compressed:
    flat_N = row_N * columns + column_N
    order_N = None if bool((flat_N.diff() > 0).all()) else torch.argsort(flat_N)
    row_N, column_N = _ordered(row_N, order_N), _ordered(column_N, order_N)
    starts = torch.searchsorted(row_N.contiguous(), torch.arange(rows + 1, device=row_N.device))
    return starts.int(), column_N.int(), order_N


_PATTERNS: WeakValueDictionary[tuple[int, int, str, bytes], Pattern] = WeakValueDictionary()
"""Patterns in use. The layers of a task have the same ones, as do tasks with one seed."""


def shared_pattern(places_2N: Tensor, rows: int, columns: int, device: torch.device) -> Pattern:
    """The pattern of these places; one for all that have the same."""
    digest = sha256(places_2N.contiguous().numpy().tobytes()).digest()
    key = rows, columns, str(device), digest
    pattern = _PATTERNS.get(key)
    if pattern is None:
        pattern = _PATTERNS[key] = Pattern(places_2N.to(device), rows, columns)
    return pattern


def _product(matrix: Tensor, x_It: Tensor) -> Tensor:
    """``matrix x``."""
    if not (x_It.is_cuda or _SPARSE_CPU):
        matrix = matrix.to_dense()
    return matrix @ x_It


def _turned(x_tI: Tensor, dtype: torch.dtype) -> Tensor:
    """Transposed copy."""
    return x_tI.t().to(dtype, memory_format=torch.contiguous_format).contiguous()


@dataclass(frozen=True, slots=True)
class SparseDifference(TaskAdapter):
    """One task's difference on one linear: ``y[columns] += S x``."""

    values_N: nn.Parameter
    pattern: Pattern
    columns: tuple[int, int]
    """Outputs that it adds to; the frozen weight may hold several linears that read the same input."""


def attach_entries(values_N: nn.Parameter, frozen: Frozen) -> SparseDifference:
    """A task's difference at a linear, as the rank has it."""
    assert frozen.places_2N is not None
    first, last = frozen.columns
    inputs = sum(stop - start for start, stop in frozen.inputs.ranges)
    pattern = shared_pattern(frozen.places_2N, last - first, inputs, values_N.device)
    return SparseDifference(values_N, pattern, frozen.columns)


class SparseAdder:
    """Differences of several tasks on one linear.

    Args:
        differences: Tokens of each, none of them empty, and the difference.
    """

    keeps_input = True

    def __init__(self, differences: Sequence[tuple[Span, TaskAdapter]]) -> None:
        self.parameters: list[Tensor] = []
        self._tasks: dict[tuple[int, int], list[tuple[int, slice, Pattern]]] = {}
        for number, (span, each) in enumerate(differences):
            assert isinstance(each, SparseDifference)
            own = self._tasks.setdefault((span.start, span.stop), [])
            own.append((number, slice(*each.columns), each.pattern))
            self.parameters.append(each.values_N)

    def add_(self, y_TO: Tensor, x_TI: Tensor) -> Saved:
        """Add all products; the values are kept."""
        dtype = self.parameters[0].dtype
        for rows, own in self._tasks.items():
            x_It = _turned(x_TI[slice(*rows)], dtype)
            for number, columns, pattern in own:
                update_Ot = _product(pattern.matrix(self.parameters[number].detach()), x_It)
                y_TO[slice(*rows), columns] += _turned(update_Ot, dtype)
        return list(self.parameters)

    def add_input_gradients_(
        self, grad_TO: Tensor, dx_TI: Tensor | None, saved: Sequence[Tensor], *, at_once: bool
    ) -> list[Tensor]:
        """Add the products with the transposed differences to the gradient of the input."""
        if dx_TI is None:
            return []
        dtype = saved[0].dtype
        for rows, own in self._tasks.items():
            total_It: Tensor | None = None
            for number, columns, pattern in own:
                grad_Ot = _turned(grad_TO[slice(*rows), columns], dtype)
                dx_It = _product(pattern.transposed(saved[number].detach()), grad_Ot)
                total_It = dx_It if total_It is None else total_It.add_(dx_It)
            assert total_It is not None, "a task is here with a difference"
            dx_TI[slice(*rows)] += _turned(total_It, dtype)
        return []

    def gradients(
        self, grad_TO: Tensor, x_TI: Tensor, saved: Sequence[Tensor], more: Sequence[Tensor]
    ) -> list[Tensor]:
        """Gradients of the values."""
        grads: list[Tensor] = list(saved)
        for rows, own in self._tasks.items():
            x_It = _turned(x_TI[slice(*rows)], saved[0].dtype)
            for number, columns, pattern in own:
                grad_Ot = _turned(grad_TO[slice(*rows), columns], saved[0].dtype)
                grads[number] = pattern.product_at_places(grad_Ot, x_It)
        return grads


def _build_difference(
    content: Content, in_features: int, out_features: int, entries: int, tokens: int
) -> tuple[Run, Run]:
    x_TI, dx_TI = content.normal(tokens, in_features), content.normal(tokens, in_features)
    y_TO, grad_TO = content.normal(tokens, out_features), content.normal(tokens, out_features)
    dtype = torch.promote_types(x_TI.dtype, torch.float32)
    values_N = nn.Parameter(content.normal(entries).to(dtype))
    places_2N = draw_places(out_features, in_features, entries, 0).long()
    pattern = shared_pattern(places_2N, out_features, in_features, x_TI.device)
    columns = (0, out_features)
    adder = SparseAdder([(Span(0, 0, tokens), SparseDifference(values_N, pattern, columns))])
    total_N = torch.zeros_like(values_N)

    @torch.no_grad()
    def forward() -> object:
        return adder.add_(y_TO, x_TI)

    @torch.no_grad()
    def backward() -> object:
        adder.add_input_gradients_(grad_TO, dx_TI, [values_N], at_once=True)
        (grad_N,) = adder.gradients(grad_TO, x_TI, [values_N], ())
        return total_N.add_(grad_N)  # as autograd does over the micro-batches

    return forward, backward


BUILDERS: dict[str, Callable[..., tuple[Run, Run]]] = {"sparse": _build_difference}
"""One difference for the profiler."""
