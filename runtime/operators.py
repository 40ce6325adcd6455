"""The operators of a stage one by one, for the profiler: built from the functions that ``Stage`` runs."""

# T tokens, D hidden size, I features in, O features out, R rank, N target tokens

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from muxtune.batches import MicrobatchLayout, Segment, row_slots
from muxtune.graph.attention_backends import DEFAULT_ATTENTION, AttentionName
from muxtune.graph.operators import FWD_ONLY, Operator, Phase, stage_layout
from muxtune.model import ModelSpec
from muxtune.peft import METHODS, attachments, everywhere
from muxtune.tasks import DatasetSpec, Example, PeftTask
from runtime.attention import (
    BACKENDS,
    RopeTables,
    attention_site,
    build_attention_plan,
    causal_attention,
    refusals,
)
from runtime.backbone.hugging_face import load_hf_model, torch_dtype
from runtime.backbone.layers import Embedding, Head, Norm
from runtime.backbone.stage import Stage
from runtime.data.batch import MicrobatchTensors, build_microbatch
from runtime.ops.dropout import Dropout, kept_input
from runtime.ops.elementwise import LayerNorm, RmsNorm, find_activation, find_gated_activation
from runtime.peft import RUNTIME_METHODS, frozen_linear
from runtime.tasks.optimizer import build_optimizer

Run = Callable[[], object]
Built = tuple[Run, Run | None]


class TorchOperators:
    """Operator suite of this runtime (entry point ``torch``).

    Args:
        attention: Backend that computes attention.
    """

    def __init__(self, attention: AttentionName = DEFAULT_ATTENTION) -> None:
        self._attention = attention

    def build(self, op: Operator, model: ModelSpec, device: str, *, needs_backward: bool = True) -> Built:
        """Forward and backward of one operator with random content (see ``OperatorSuite``).

        Raises:
            ValueError: A kind that needs two ranks (``LINK_KINDS``).
        """
        build = _BUILDERS.get(op.kind) or _method_builder(op.kind)
        if build is None:
            raise ValueError(f"{op} cannot be built on one rank")
        forward, backward = build(_Content(model, device, self._attention), *op.dims)
        return forward, backward if needs_backward and op.kind not in FWD_ONLY else None

    def attention_needs(self, model: ModelSpec, device: str) -> Mapping[AttentionName, str | None]:
        """What every attention backend lacks there (see ``AttentionSuite``)."""
        apart = "to keep a NaN in its sequence: tasks that share a micro-batch would share it"
        needs = refusals(attention_site(model, device))
        return {
            name: why if why is not None or BACKENDS[name].isolates else apart for name, why in needs.items()
        }

    def with_attention(self, backend: AttentionName) -> TorchOperators:
        """This suite with that attention backend."""
        return TorchOperators(backend)

    def build_attention(
        self, lengths: Sequence[int], model: ModelSpec, device: str
    ) -> dict[Phase, Callable[[], object]]:
        """Attention of sequences that lie one after the other in a stream (see ``AttentionSuite``)."""
        starts = np.cumsum([0, *lengths[:-1]]).tolist()
        segments = [Segment(0, i, starts[i], length, length) for i, length in enumerate(lengths)]
        forward, backward = _attend(_Content(model, device, self._attention), segments, sum(lengths))
        assert backward is not None
        return {"fwd": forward, "bwd": backward}


@dataclass(frozen=True, slots=True)
class _Content:
    """Random tensors in the dtype of a backbone."""

    model: ModelSpec
    device: str
    attention: AttentionName

    def normal(self, *shape: int, requires_grad: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        tensor = torch.randn(*shape, generator=generator).to(self.device, torch_dtype(self.model))
        return tensor.requires_grad_(requires_grad)

    def ids(self, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.model.vocab, (n,), generator=generator).to(self.device)

    def norm(self) -> Norm:
        weight_D = self.normal(self.model.hidden)
        if self.model.rms_norm:
            return RmsNorm(weight_D, self.model.norm_eps)
        return LayerNorm(weight_D, weight_D, self.model.norm_eps)


@dataclass(slots=True)
class _Recorded:
    """A forward whose graph is kept, so that its backward can run again and again."""

    run: Callable[[], tuple[Tensor, ...]]
    inputs: Sequence[Tensor]
    outputs: tuple[Tensor, ...] = ()
    grads: list[Tensor] = field(default_factory=list)

    def forward(self) -> object:
        self.outputs = self.run()
        if not self.grads:
            self.grads = [torch.ones_like(output) for output in self.outputs]
        return self.outputs

    def backward(self) -> object:
        return torch.autograd.grad(self.outputs, self.inputs, self.grads, retain_graph=True)


def _recorded(run: Callable[[], tuple[Tensor, ...]], *inputs: Tensor) -> Built:
    recorded = _Recorded(run, inputs)
    return recorded.forward, recorded.backward


def _linear(content: _Content, in_features: int, out_features: int, tokens: int) -> Built:
    x_TI = content.normal(tokens, in_features, requires_grad=True)
    weight_OI = content.normal(out_features, in_features)
    bias_O = content.normal(out_features) if content.model.mlp_bias else None
    return _recorded(lambda: (frozen_linear(x_TI, weight_OI, bias_O),), x_TI)


def _dropout(content: _Content, features: int, tokens: int) -> Built:
    x_tI, dx_tI = content.normal(tokens, features), content.normal(tokens, features)
    share_tI = x_tI.to(torch.promote_types(x_tI.dtype, torch.float32))  # of the pair, in its dtype
    dropout = Dropout(0.1, linear=0)
    keys_t = torch.arange(tokens, device=content.device)

    def forward() -> object:
        return kept_input(x_tI, dropout.keep(keys_t, features))

    def backward() -> object:
        keep_tI = dropout.keep(keys_t, features)
        return kept_input(x_tI, keep_tI), dx_tI.add_(share_tI.mul_(keep_tI))

    return forward, backward


def _attention(content: _Content, sequences: int, length: int) -> Built:
    tokens = sequences * length
    # Last sequence first: rows that lie as in the stream would need no gather.
    segments = [Segment(0, i, (sequences - 1 - i) * length, length, length) for i in range(sequences)]
    return _attend(content, segments, tokens)


def _attend(content: _Content, segments: Sequence[Segment], tokens: int) -> Built:
    model = content.model
    plan = build_attention_plan(segments, tokens, content.device, backend=content.attention)
    features = (model.heads + 2 * model.kv_heads) * model.head_dim
    qkv_TF = content.normal(tokens, features, requires_grad=True)
    rope = None
    if not model.learned_positions:
        longest = max(segment.row_tokens for segment in segments)
        angles = content.normal(row_slots(longest), model.head_dim)
        rope = RopeTables.build(angles.cos(), angles.sin())
    return _recorded(lambda: (causal_attention(qkv_TF, plan, model.heads, model.kv_heads, rope),), qkv_TF)


def _norm(content: _Content, tokens: int) -> Built:
    norm = content.norm()
    update_TD = content.normal(tokens, content.model.hidden)
    residual_TD = content.normal(tokens, content.model.hidden, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        return norm.add(residual_TD, update_TD)  # both results are used, so both send gradients

    return _recorded(run, residual_TD)


def _activation(content: _Content, tokens: int) -> Built:
    model = content.model
    activation = (find_gated_activation if model.gated else find_activation)(model.activation)
    x_TF = content.normal(tokens, model.ffn * (2 if model.gated else 1), requires_grad=True)
    return _recorded(lambda: (activation(x_TF),), x_TF)


def _embedding(content: _Content, tokens: int) -> Built:
    model = content.model
    positions_PD = content.normal(model.max_positions, model.hidden) if model.learned_positions else None
    embedding = Embedding(content.normal(model.vocab, model.hidden), positions_PD)
    tokens_T = content.ids(tokens)
    positions_T = torch.arange(tokens, device=content.device) % model.max_positions
    return lambda: embedding.forward(tokens_T, positions_T), None


def _head(content: _Content, targets: int) -> Built:
    model = content.model
    head = Head(content.norm(), content.normal(model.vocab, model.hidden))
    hidden_ND = content.normal(targets, model.hidden, requires_grad=True)
    rows_N, ids_N = torch.arange(targets, device=content.device), content.ids(targets)
    return _recorded(lambda: (head.target_nll(hidden_ND, rows_N, ids_N).sum(),), hidden_ND)


def _optimizer(content: _Content, tensors: int, parameters: int) -> Built:
    sizes = [len(part) for part in np.array_split(np.arange(parameters), tensors)]
    trained = [nn.Parameter(content.normal(size)) for size in sizes]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    return build_optimizer(trained, _task("profiled", r=1, length=2)).step, None


def _feed(content: _Content, sequences: int) -> Built:
    build = _microbatch_builder(content, stage_layout(Operator("stage", (1, 1, 1, sequences, _FEED_LENGTH))))
    return build, None


_FEED_LENGTH = 64
"""Tokens of the longest sequence: copying them costs little beside handling the sequence."""


def _stage(content: _Content, layers: int, tasks: int, r: int, sequences: int, length: int) -> Built:
    # Only the layers matter: a small vocabulary spares the memory of embedding and head.
    spec = content.model.model_copy(update={"source": "preset", "layers": layers, "vocab": 8})
    weights = load_hf_model(spec)
    stage = Stage(spec, range(layers), first=False, last=False, weights=weights, device=content.device)
    layout = stage_layout(Operator("stage", (layers, tasks, r, sequences, length)))
    for task_id in _task_ids(layout) if r else ():
        task = _task(task_id, r=r, length=length)
        stage.add_task(task, _random_adapter(content, spec, task))
    build = _microbatch_builder(content, layout)
    received_TD = content.normal(layout.tokens, spec.hidden)
    gradient_TD = torch.ones_like(received_TD)
    opened: deque[tuple[Tensor, Tensor]] = deque()

    def forward() -> object:
        batch = build()
        hidden_TD = received_TD.detach().requires_grad_()
        opened.append((hidden_TD, stage.forward(batch, hidden_TD)))
        return opened

    def backward() -> object:
        hidden_TD, output_TD = opened.popleft()
        torch.autograd.backward(output_TD, gradient_TD)  # the adapters' gradients are summed up
        return hidden_TD.grad

    forward()  # as in 1F1B, another micro-batch is open all the while, and a backward finds its own less warm
    return forward, backward


def _microbatch_builder(content: _Content, layout: MicrobatchLayout) -> Callable[[], MicrobatchTensors]:
    task_ids = _task_ids(layout)
    examples = [
        [Example(np.zeros(s.length, dtype=np.int64), 1) for s in layout.segments if s.task == task]
        for task in range(len(task_ids))
    ]
    return lambda: build_microbatch(
        layout, examples, content.device, task_ids=task_ids, attention=content.attention
    )


def _task_ids(layout: MicrobatchLayout) -> list[str]:
    return [f"task-{i}" for i in range(len(layout.spans))]


def _task(task_id: str, *, r: int, length: int) -> PeftTask:
    return PeftTask(
        id=task_id,
        peft=everywhere(r),
        dataset=DatasetSpec(lengths="sst2"),
        global_batch_size=1,
        micro_batch_size=1,
        max_length=max(length, 2),
        learning_rate=1e-3,
        steps=1,
    )


def _random_adapter(content: _Content, spec: ModelSpec, task: PeftTask) -> dict[str, Tensor]:
    dtype = torch.promote_types(torch_dtype(spec), torch.float32)
    method = RUNTIME_METHODS.get(task.peft.method)
    return {
        method.file_part(each, tensor, layer, spec).key: content.normal(*tensor.shape).to(dtype) * 0.01
        for layer in range(spec.layers)
        for each in attachments(task.peft, spec, layer)
        for tensor in each.tensors
    }


def _method_builder(kind: str) -> Callable[..., Built] | None:
    """What builds an operator of a PEFT method."""
    for name in METHODS.names():
        if kind in METHODS.get(name).kinds:
            return RUNTIME_METHODS.get(name).builders()[kind]
    return None


_BUILDERS: dict[str, Callable[..., Built]] = {
    "linear": _linear,
    "dropout": _dropout,
    "attention": _attention,
    "norm": _norm,
    "activation": _activation,
    "embedding": _embedding,
    "head": _head,
    "optimizer": _optimizer,
    "feed": _feed,
    "stage": _stage,
}
