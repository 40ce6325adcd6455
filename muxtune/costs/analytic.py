"""Operators on a GPU that is not at hand: the calibrated models of a device, put together.

What an operator of :data:`muxtune.operators.KINDS` runs on a GPU, and which model prices it:

linear      one product; the backward is the input's gradient, a product with the two widths exchanged
lora        one task's pair in the grouped kernels (or as torch operations), see :mod:`muxtune.costs.adapters`
dropout     torch operations on 64-bit integers, each for four features; the pair then runs as such operations
            too, for which the grouped kernels' price stands
attention   rotation of queries and keys in place, and FlashAttention on sequences where they lie in the
            stream
norm        residual addition and a fused norm; backward: fused, and the addition of the residual's gradient
activation  one fused kernel
embedding   gather of rows; of learned positions a second one, and an addition
head        gather of target rows, norm, product with the vocabulary, cross-entropy in float32 by bytes
optimizer   fused AdamW in float32 by bytes
p2p and collectives by :mod:`muxtune.costs.collectives`
feed, message  0: the processor does them while the GPU computes

**Host.** After a kernel that is shorter than its launch from Python, the GPU waits for the next launch. An
operator therefore takes at least the time of its launches; adapters hide theirs behind the frozen product
that they run beside.

**Precision.** bfloat16 (measured as float16, which has the same rates). A float32 backbone is priced by the
data sheets' float32 arithmetic and by its bytes, see :meth:`muxtune.costs.gpu.Gpu.product_s`; that is coarse.
Other dtypes are refused.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import ceil
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from muxtune.costs.adapters import (
    GROUP_KERNELS,
    PAIR_KIND,
    Pair,
    grouped_seconds,
    pair_kernels,
    pair_seconds,
)
from muxtune.costs.attention import Heads
from muxtune.costs.base import CostModel
from muxtune.costs.collectives import Interconnect
from muxtune.costs.gemm import gemm_seconds
from muxtune.costs.gpu import load_gpu
from muxtune.costs.identity import own_ref
from muxtune.costs.links import AS_GIVEN
from muxtune.costs.pointwise import ELEMENT_BYTES, PointwiseKind
from muxtune.costs.ref import CostsRef
from muxtune.graph.layer import Launching, frozen_products
from muxtune.model import DTYPE_BYTES, ModelSpec
from muxtune.operators import KINDS, LINK_KINDS, GpuWork, Operator, Phase
from muxtune.placement import Route
from muxtune.support.errors import SpecError

AdapterKernels = Literal["grouped", "torch"]

HOST_LAUNCH_S = 5e-6
"""Processor time from Python to the launched kernel: an assumption, not measured. Operations of torch
take 5 to 25 us with autograd; this is the lower end, because an operator's kernels share its Python."""

FACTOR_BYTES = DTYPE_BYTES["float32"]
"""Adapters are kept in float32, as PEFT does."""

_DTYPES = ("bfloat16", "float32")
_FLOAT32_BYTES = 4
_ADAMW_STREAMS = 7
"""Parameter, gradient and two moments are read; parameter and moments are written."""
_MASK_KERNELS = 28
_MASK_STREAMS = 29
_WORD_BYTES, _FEATURES_PER_WORD = 8, 4
"""Parts of the price of a dropout mask: kernels of torch's integer operations, half of them on tokens alone,
and the arrays of 64-bit words that the other half reads and writes before it writes a byte per feature."""
_TENSORS_PER_LAUNCH = 36
"""Tensors that one of torch's multi-tensor kernels takes when it works on four lists."""

Priced = tuple[float, int]
"""Seconds on the device, and kernels."""


class AnalyticCosts(CostModel):
    """Costs from shipped coefficients alone.

    Args:
        device: One with coefficients, see :func:`muxtune.costs.devices.device_names`.
        model: The backbone whose operators are priced.
        interconnect: Links of the cluster. A transfer that does not say where it goes is priced as one over
            the slowest of them.
        adapter_kernels: Whether adapters run in the grouped kernels or as separate operations of torch.
        host_launch_s: Processor time per kernel; 0 for a captured graph.

    Raises:
        UserError: No such device, or a dtype that it cannot be priced in.
    """

    def __init__(
        self,
        device: str,
        model: ModelSpec,
        interconnect: Interconnect,
        *,
        adapter_kernels: AdapterKernels = "grouped",
        host_launch_s: float = HOST_LAUNCH_S,
    ) -> None:
        if model.dtype not in _DTYPES:
            raise SpecError("dtype", model.dtype, f"{' or '.join(_DTYPES)} on {device}")
        self.gpu = load_gpu(device)
        self.model = model
        self.interconnect = interconnect
        self.adapter_kernels = adapter_kernels
        self.host_launch_s = host_launch_s
        self._begin()

    def _begin(self) -> None:
        """What follows from the settings; nothing is priced yet."""
        model = self.model
        self._heads = Heads(heads=model.heads, kv_heads=model.kv_heads, head_dim=model.head_dim)
        self._known: dict[tuple[str, tuple[int, ...], Route | None, Phase], float] = {}
        self._known_products: dict[tuple[int, int, int], float] = {}
        products = frozen_products(model)
        self._frozen_widths = tuple(dict.fromkeys((*products, *(each[::-1] for each in products))))
        """Output and input features of the frozen products of a layer, forth and back."""
        self._known_groups: dict[tuple[tuple[tuple[int, ...], ...], Phase], float] = {}
        self._shards: dict[int, Self] = {}
        self._on_device: dict[str, Callable[[tuple[int, ...], Phase], Priced]] = {
            "linear": self._linear,
            "dropout": self._dropout,
            "attention": self._attention,
            "carried_attention": self._carried_attention,
            "norm": self._norm,
            "activation": self._activation,
            "embedding": self._embedding,
            "head": self._head,
            "optimizer": self._optimizer,
        }

    @property
    def ref(self) -> CostsRef:
        """Identity, for a plan: changes with every coefficient and with the links."""
        settings = (self.adapter_kernels, self.host_launch_s, self.model.dtype)
        cluster = self.interconnect.cluster
        routes = [Route((2,), paired) for paired in (True, False)] if cluster.devices_per_node > 1 else []
        routes += [Route((1, 1), True)] if cluster.nodes > 1 else []
        links = [  # by what they charge for small, middling and large messages
            self._link_s(op)
            for bytes_ in (1 << 10, 1 << 20, 1 << 28)
            for op in (
                Operator("p2p", (bytes_,)),
                Operator("all_reduce", (bytes_, cluster.ranks)),
                *(Operator("p2p", (bytes_,), route) for route in routes),
                *(Operator("all_reduce", (bytes_, route.ranks), route) for route in routes),
            )
        ]
        digest = hashlib.sha256(f"{self.gpu.digest} {links} {settings}".encode()).hexdigest()
        ref = CostsRef(
            kind="fitted",
            profile_id=f"analytic-{self.gpu.name}-{digest[:12]}",
            device=self.gpu.name,
            digest=digest,
        )
        return ref if type(self) is AnalyticCosts else own_ref(self, ref, self.latency_s)

    @contextmanager
    def noting(self) -> Iterator[list[str]]:
        """What of the device's coefficients is derived or assumed."""
        notes: list[str] = []
        yield notes
        if self.model.dtype_bytes == _FLOAT32_BYTES:
            notes.append(f"float32 on {self.gpu.name} is priced by data sheets, not by measurements")
        if self.host_launch_s:
            notes.append(f"a launch from Python takes {1e6 * self.host_launch_s:g} us, which is assumed")
        if self.interconnect.cluster.ranks > 1:
            notes += [
                f"link {link.link} of {link.device} is derived, not measured: {link.basis}"
                for link in self.interconnect.links
                if link.fit is None and link.basis != AS_GIVEN
            ]

    def latency_s(self, op: Operator, phase: Phase) -> float:
        """Seconds of one operator; nothing to do costs nothing."""
        key = (op.kind, op.dims, op.route, phase)  # a search asks for the same ones again and again
        seconds = self._known.get(key)
        if seconds is None:
            seconds = self._known[key] = 0.0 if 0 in op.dims else self._latency_s(op, phase)
        return seconds

    def group_latency_s(self, ops: Sequence[Operator], phase: Phase) -> float:
        """Seconds of the adapters of several tasks at one linear; grouped kernels run them in one launch."""
        if self.adapter_kernels == "torch" or ops[0].kind != PAIR_KIND:
            return sum(self.latency_s(op, phase) for op in ops)
        key = (tuple([op.dims for op in ops]), phase)
        seconds = self._known_groups.get(key)
        if seconds is None:
            pairs = [_pair(op) for op in ops if 0 not in op.dims]
            seconds = self._grouped_s(pairs, phase) if pairs else 0.0
            if self._has_own_prices and seconds:  # a launch changes as its pairs do alone
                alone_s = sum(AnalyticCosts.latency_s(self, op, phase) for op in ops)
                seconds *= sum(self.latency_s(op, phase) for op in ops) / alone_s
            self._known_groups[key] = seconds
        return seconds

    def linear_latencies_s(
        self, in_features: int, out_features: int, tokens: NDArray[np.int64], phase: Phase
    ) -> NDArray[np.float64]:
        """Seconds of a frozen product at many numbers of tokens, together; equals :meth:`latency_s`."""
        if self._has_own_prices or self.model.dtype_bytes != ELEMENT_BYTES:
            return super().linear_latencies_s(in_features, out_features, tokens, phase)
        n, k = (out_features, in_features) if phase == "fwd" else (in_features, out_features)
        return np.maximum(gemm_seconds(self.gpu.gemm, tokens, n, k), self.host_launch_s)

    @property
    def _has_own_prices(self) -> bool:
        """Whether this is a subclass that prices operators in a way of its own."""
        return type(self).latency_s is not AnalyticCosts.latency_s

    def shard(self, tp: int) -> Self:
        """Costs on one of ``tp`` ranks: the same device and links, narrower operators."""
        if tp == 1:
            return self
        if tp not in self._shards:
            self._shards[tp] = self._changed(self.model.shard(tp), self.adapter_kernels)
        return self._shards[tp]

    def with_adapters(self, launching: Launching) -> Self:
        """Costs on the same device and links, with adapters in grouped kernels or as operations of torch."""
        kernels: AdapterKernels = "grouped" if launching == "grouped" else "torch"
        return self if kernels == self.adapter_kernels else self._changed(self.model, kernels)

    def _changed(self, model: ModelSpec, adapter_kernels: AdapterKernels) -> Self:
        """These costs, of whatever class, for another backbone or other kernels."""
        changed = copy.copy(self)
        changed.model, changed.adapter_kernels = model, adapter_kernels
        changed._begin()
        return changed

    def action_s(self, operators_s: float, phase: Phase) -> float:
        """The sum itself: what launches take is part of the operators."""
        return operators_s

    def exploring(self) -> AbstractContextManager[None]:
        """Changes nothing: a formula has no shapes that it was not measured at."""
        return nullcontext()

    def _latency_s(self, op: Operator, phase: Phase) -> float:
        if op.kind in self._on_device:
            device_s, kernels = self._on_device[op.kind](op.dims, phase)
            return max(device_s, kernels * self.host_launch_s)
        if op.kind == PAIR_KIND:
            return self._pair_s(op, phase)
        return self._link_s(op) if op.kind in LINK_KINDS | {"feed"} else self._adapter_s(op, phase)

    def _link_s(self, op: Operator) -> float:
        links = self.interconnect
        bytes_ = float(op.dims[0])
        if op.kind in {"feed", "message"}:
            return 0.0
        if op.kind == "p2p":
            if op.route is not None:
                return links.message_s(bytes_, op.route)
            return links.send_recv_s(bytes_, across_nodes=links.cluster.nodes > 1)
        ranks = op.route or op.dims[-1]
        if op.kind == "all_reduce":
            return links.all_reduce_s(bytes_, ranks)
        if op.kind == "all_gather":
            return links.all_gather_s(bytes_, ranks)
        return links.reduce_scatter_s(bytes_, ranks)

    def _product_s(self, m: int, n: int, k: int) -> float:
        if self.model.dtype_bytes != ELEMENT_BYTES:
            return self.gpu.product_s(m, n, k, element_bytes=self.model.dtype_bytes)
        known = self._known_products
        if (m, n, k) not in known:
            # Who has a stream go through one frozen product has it go through all, forth and back.
            widths = self._frozen_widths if (n, k) in self._frozen_widths else ((n, k),)
            seconds = gemm_seconds(self.gpu.gemm, m, *np.array(widths).T)
            known |= zip([(m, *each) for each in widths], seconds.tolist(), strict=True)
        return known[m, n, k]

    def _pointwise_s(self, kind: PointwiseKind, tokens: int, width: int, phase: Phase) -> float:
        return self.gpu.pointwise_s(kind, tokens, width, phase, element_bytes=self.model.dtype_bytes)

    def _linear(self, dims: tuple[int, ...], phase: Phase) -> Priced:
        """A bias is added in the product's epilogue."""
        i, o, tokens = dims
        return (self._product_s(tokens, o, i) if phase == "fwd" else self._product_s(tokens, i, o)), 1

    def _dropout(self, dims: tuple[int, ...], phase: Phase) -> Priced:
        """The chain of integer operations by bytes, comparison and product; backward: and a masked sum."""
        elements = dims[0] * dims[1]
        mask_bytes = (_MASK_STREAMS * _WORD_BYTES // _FEATURES_PER_WORD + 1) * elements
        input_bytes = (2 * self.model.dtype_bytes + 1) * elements
        if phase == "fwd":
            return self.gpu.stream_s(mask_bytes + input_bytes, launches=_MASK_KERNELS + 1), _MASK_KERNELS + 1
        # The product with A is written, masked in place, and added to the gradient of the frozen product.
        gradient_bytes = (3 * FACTOR_BYTES + 1 + FACTOR_BYTES + 2 * self.model.dtype_bytes) * elements
        kernels = _MASK_KERNELS + 3
        return self.gpu.stream_s(mask_bytes + input_bytes + gradient_bytes, launches=kernels), kernels

    def _adapter_s(self, op: Operator, phase: Phase) -> float:
        """What a PEFT method says that it runs, by products and bytes."""
        kind = KINDS[op.kind]
        if kind.work is None:
            raise ValueError(f"{op} is not priced: it is composed of the others")
        if kind.gpu is None:
            work = kind.work(op.dims, phase, self.model)
            runs = GpuWork(bytes=work.bytes, kernels=ceil(work.launches))
        else:
            runs = kind.gpu(op.dims, phase, self.model)
        products = (self.gpu.product_s(*dims, element_bytes=FACTOR_BYTES) for dims in runs.products)
        device_s = sum(products) + self.gpu.stream_s(runs.bytes, launches=runs.kernels)
        return max(device_s, (len(runs.products) + runs.kernels) * self.host_launch_s)

    def _pair_s(self, op: Operator, phase: Phase) -> float:
        pair = _pair(op)
        if self.adapter_kernels == "grouped":
            return self._grouped_s([pair], phase)
        element_bytes = self.model.dtype_bytes
        device_s = pair_seconds(self.gpu, pair, phase, element_bytes=element_bytes, factor_bytes=FACTOR_BYTES)
        kernels = pair_kernels(phase, converts=element_bytes != FACTOR_BYTES)
        return self._beside_product_s(device_s, kernels, [pair], phase)

    def _grouped_s(self, pairs: Sequence[Pair], phase: Phase) -> float:
        device_s = grouped_seconds(
            self.gpu, pairs, phase, element_bytes=self.model.dtype_bytes, factor_bytes=FACTOR_BYTES
        )
        return self._beside_product_s(device_s, GROUP_KERNELS[phase], pairs, phase)

    def _beside_product_s(self, device_s: float, kernels: int, pairs: Sequence[Pair], phase: Phase) -> float:
        """Adapters beside their frozen product, which has at least their tokens.

        What is launched before it ends is hidden.
        """
        launches_s = kernels * self.host_launch_s
        if device_s >= launches_s:
            return device_s
        tokens = sum(pair.tokens for pair in pairs)
        product_s, launches = self._linear((pairs[0].in_features, pairs[0].out_features, tokens), phase)
        return max(device_s, launches_s - max(0.0, product_s - launches * self.host_launch_s))

    def _attention(self, dims: tuple[int, ...], phase: Phase) -> Priced:
        sequences, length = dims
        return self._carried_attention((sequences, length, length), phase)

    def _carried_attention(self, dims: tuple[int, ...], phase: Phase) -> Priced:
        sequences, queries, keys = dims
        model = self.model
        kernels = 1 if phase == "fwd" else 3
        seconds = self.gpu.attention_s(
            self._heads, sequences, queries, phase, keys=keys, element_bytes=model.dtype_bytes
        )
        if not model.learned_positions:
            rotated = (model.heads + model.kv_heads) * model.head_dim
            seconds += self._pointwise_s("rope", sequences * queries, rotated, phase)
            kernels += 1
        return seconds, kernels

    def _norm(self, dims: tuple[int, ...], phase: Phase) -> Priced:
        kind: PointwiseKind = "rms_norm" if self.model.rms_norm else "layer_norm"
        add_s, norm_s = (self._pointwise_s(k, dims[0], self.model.hidden, phase) for k in ("add", kind))
        return add_s + norm_s, 2

    def _activation(self, dims: tuple[int, ...], phase: Phase) -> Priced:
        if self.model.gated:
            return self._pointwise_s("silu_gate", dims[0], self.model.ffn, phase), 1
        if self.model.activation == "relu":
            streams = 2 if phase == "fwd" else 3
            return self.gpu.stream_s(streams * self.model.dtype_bytes * dims[0] * self.model.ffn), 1
        return self._pointwise_s("gelu", dims[0], self.model.ffn, phase), 1

    def _embedding(self, dims: tuple[int, ...], phase: Phase) -> Priced:
        gather_s = self._pointwise_s("gather", dims[0], self.model.hidden, phase)
        if not self.model.learned_positions:
            return gather_s, 1
        return 2 * gather_s + self._pointwise_s("add", dims[0], self.model.hidden, phase), 3

    def _head(self, dims: tuple[int, ...], phase: Phase) -> Priced:
        """Logits are read and written: conversion to float32, log-softmax; backward the same way back."""
        targets, hidden, vocab = dims[0], self.model.hidden, self.model.vocab
        converts = self.model.dtype_bytes != _FLOAT32_BYTES
        norm: PointwiseKind = "rms_norm" if self.model.rms_norm else "layer_norm"
        rows_s = self._pointwise_s("gather", targets, hidden, phase)
        rows_s += self._pointwise_s(norm, targets, hidden, phase)
        convert_bytes = (self.model.dtype_bytes + _FLOAT32_BYTES) * targets * vocab if converts else 0
        # Forward: reads logits and writes their log-softmax. Backward: fills the gradient of the log-softmax,
        # then reads both and writes the logits'.
        softmax_bytes = (2 if phase == "fwd" else 4) * _FLOAT32_BYTES * targets * vocab
        loss_s = self.gpu.stream_s(convert_bytes, launches=int(converts))
        loss_s += self.gpu.stream_s(softmax_bytes, launches=2)
        product_s, _ = self._linear((hidden, vocab, targets), phase)
        return rows_s + product_s + loss_s, 5 + converts

    def _optimizer(self, dims: tuple[int, ...], phase: Phase) -> Priced:
        tensors, parameters = dims
        launches = 1 + ceil(tensors / _TENSORS_PER_LAUNCH)  # the first counts the steps
        bytes_ = _ADAMW_STREAMS * FACTOR_BYTES * parameters
        return self.gpu.stream_s(bytes_, launches=launches), launches


def _pair(op: Operator) -> Pair:
    in_features, out_features, r, tokens = op.dims
    return Pair(in_features=in_features, out_features=out_features, r=r, tokens=tokens)
