"""Sparse differences of frozen weights: ``y += S x`` for the rows of each task on a linear."""

# T tokens of the stream, t of one task, I features in, O features out, N entries of a difference

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
        return _csr(starts, others_N, values_N.index_select(0, order_N), self.shape)

    def transposed(self, values_N: Tensor) -> Tensor:
        """Its transpose, sparse."""
        starts, others_N, order_N = self._columns
        return _csr(starts, others_N, values_N.index_select(0, order_N), self.shape[::-1])

    def product_at_places(self, grad_tO: Tensor, x_tI: Tensor) -> Tensor:
        """Entries of ``grad^T x``, ``[N]``."""
        starts, others_N, order_N = self._rows
        if x_tI.is_cuda or _SPARSE_CPU:
            zeros = _csr(starts, others_N, x_tI.new_zeros(len(order_N)), self.shape)
            sorted_N = torch.sparse.sampled_addmm(zeros, grad_tO.t(), x_tI, beta=0.0).values()
        else:
            rows_N = torch.repeat_interleave(starts.diff())
            sorted_N = (grad_tO.t() @ x_tI)[rows_N, others_N]
        return torch.empty_like(sorted_N).index_copy_(0, order_N, sorted_N)


def _csr(starts: Tensor, others_N: Tensor, values_N: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts, others_N, values_N, shape, check_invariants=False)


def _compressed(row_N: Tensor, column_N: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Starts of rows and columns of entries, 32-bit as libraries have them; and which entries these are."""
    order_N = torch.argsort(row_N * columns + column_N)
    starts = torch.searchsorted(row_N[order_N].contiguous(), torch.arange(rows + 1, device=row_N.device))
    return starts.int(), column_N[order_N].int(), order_N


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


def _product(matrix: Tensor, x_tI: Tensor) -> Tensor:
    """``x matrix^T``, ``[t, O]``."""
    if not (x_tI.is_cuda or _SPARSE_CPU):
        matrix = matrix.to_dense()
    return (matrix @ x_tI.t()).t()


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
        self._pieces: list[tuple[slice, slice, Pattern]] = []
        self.parameters: list[Tensor] = []
        for span, each in differences:
            assert isinstance(each, SparseDifference)
            self._pieces.append((slice(span.start, span.stop), slice(*each.columns), each.pattern))
            self.parameters.append(each.values_N)

    def add_(self, y_TO: Tensor, x_TI: Tensor) -> Saved:
        """Add all products; the values are kept."""
        for (rows, columns, pattern), values_N in zip(self._pieces, self.parameters, strict=True):
            x_tI = x_TI[rows].to(values_N.dtype)
            y_TO[rows, columns] += _product(pattern.matrix(values_N.detach()), x_tI)
        return list(self.parameters)

    def add_input_gradients_(
        self, grad_TO: Tensor, dx_TI: Tensor | None, saved: Sequence[Tensor], *, at_once: bool
    ) -> list[Tensor]:
        """Add the products with the transposed differences to the gradient of the input."""
        if dx_TI is not None:
            for (rows, columns, pattern), values_N in zip(self._pieces, saved, strict=True):
                grad_tO = grad_TO[rows, columns].to(values_N.dtype)
                dx_TI[rows] += _product(pattern.transposed(values_N.detach()), grad_tO)
        return []

    def gradients(
        self, grad_TO: Tensor, x_TI: Tensor, saved: Sequence[Tensor], more: Sequence[Tensor]
    ) -> list[Tensor]:
        """Gradients of the values."""
        return [
            pattern.product_at_places(
                grad_TO[rows, columns].to(values_N.dtype), x_TI[rows].to(values_N.dtype)
            )
            for (rows, columns, pattern), values_N in zip(self._pieces, saved, strict=True)
        ]


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
