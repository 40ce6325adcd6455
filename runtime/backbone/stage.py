"""The stage of the frozen backbone that a rank holds, with the adapters of all tasks."""

# T tokens of the stream, D hidden size, K active tasks

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from muxtune.model import ModelSpec
from muxtune.support.errors import SpecError
from muxtune.tasks import PeftTask
from runtime.backbone.gpt2 import gpt2_embedding, gpt2_head, gpt2_layer
from runtime.backbone.hugging_face import hf_config
from runtime.backbone.layers import DecoderLayer, Embedding, Head, Weights
from runtime.backbone.llama import llama_embedding, llama_head, llama_layer, llama_rope
from runtime.backbone.opt import opt_embedding, opt_head, opt_layer
from runtime.data.batch import MicrobatchTensors
from runtime.distributed.sharding import WHOLE, Cut, Shard, linear_cuts
from runtime.ops.dropout import Dropout, linear_key


class Stage(nn.Module):
    """Consecutive layers of the frozen backbone, with the adapters of every task on them.

    ``parameters()`` are the frozen weights only; the trainable ones are in :meth:`task_parameters`.

    Args:
        spec: The backbone.
        layers: Numbers of the layers.
        first: Whether the stage embeds the tokens.
        last: Whether it has the head and computes losses.
        weights: Weights of the backbone; the stage asks for what it needs, tensor by tensor, and copies its
            part.
        device: Where the stage lives.
        shard: Part of the stage, if several ranks share it; :func:`muxtune.model.check_sharding` holds.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layers: range,
        *,
        first: bool,
        last: bool,
        weights: Weights,
        device: str = "cpu",
        shard: Shard = WHOLE,
    ) -> None:
        super().__init__()
        self._spec = spec
        self._shard = shard
        self._device = device
        self._layer_numbers = layers
        self.embedding: Embedding | None = None
        self.head: Head | None = None
        if spec.family == "llama":
            rope = llama_rope(spec, hf_config(spec), device)
            built = [llama_layer(spec, weights, i, rope, shard) for i in layers]
            self.embedding = llama_embedding(weights, shard) if first else None
            self.head = llama_head(spec, weights, shard) if last else None
        elif spec.family == "opt":
            built = [opt_layer(spec, weights, i, shard) for i in layers]
            self.embedding = opt_embedding(spec, weights, shard) if first else None
            self.head = opt_head(spec, weights, shard) if last else None
        else:
            built = [gpt2_layer(spec, weights, i, shard) for i in layers]
            self.embedding = gpt2_embedding(weights, shard) if first else None
            self.head = gpt2_head(spec, weights, shard) if last else None
        self.layers = nn.ModuleList(built)
        self._layers: list[DecoderLayer] = built
        self._task_parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._task_cuts: dict[str, dict[str, Cut]] = {}
        self.to(device)

    def copy(self) -> Stage:
        """Another copy of the frozen weights; no task has been added yet."""
        assert not self._task_parameters, "tasks are of one copy"
        return copy.deepcopy(self, {id(self._shard): self._shard})  # with whom it sums is not copied

    def add_task(self, task: PeftTask, adapter: Mapping[str, Tensor]) -> None:
        """Attach the adapter of a task.

        Args:
            task: Task whose adapter it is: rank, scale, targets and dropout.
            adapter: PEFT state dict of the whole model, e.g. with
                ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``; what belongs to the layers
                of this stage, and to its shard, is copied.

        Raises:
            SpecError: A tensor is missing or has another shape than the task says.
        """
        parameters: dict[str, nn.Parameter] = {}
        cuts: dict[str, Cut] = {}
        targets = self._spec.targeted_linears(task.peft.targets, f"tasks.{task.id}.peft.targets")
        for number, layer in zip(self._layer_numbers, self._layers, strict=True):
            for target in targets:
                path = f"base_model.model.{self._spec.layer_prefix}.{number}.{target.name}"
                shapes = {
                    f"{path}.lora_A.weight": (task.peft.r, target.in_features),
                    f"{path}.lora_B.weight": (target.out_features, task.peft.r),
                }
                pair: list[nn.Parameter] = []  # A, B
                outputs, inputs = linear_cuts(self._spec, target, self._shard)
                for (key, shape), cut in zip(shapes.items(), (inputs, outputs), strict=True):
                    tensor = adapter.get(key)
                    if tensor is None or tensor.shape != shape:
                        found = None if tensor is None else tuple(tensor.shape)
                        raise SpecError(f"adapter of {task.id}: {key}", found, f"a tensor of shape {shape}")
                    own = cut.take(tensor.detach()).clone(memory_format=torch.contiguous_format)
                    pair.append(nn.Parameter(own.to(self._device)))
                    parameters[key], cuts[key] = pair[-1], cut
                dropout = None
                if task.peft.dropout:
                    linear = linear_key(f"{self._spec.layer_prefix}.{number}.{target.name}")
                    dropout = Dropout(task.peft.dropout, linear, first_feature=inputs.ranges[0][0])
                layer.linears[target.name].attach(
                    task.id,
                    target.name,
                    a_RI=pair[0],
                    b_OR=pair[1],
                    scale=task.peft.scale,
                    dropout=dropout,
                )
        self._task_parameters[task.id], self._task_cuts[task.id] = parameters, cuts

    def task_parameters(self, task_id: str) -> dict[str, nn.Parameter]:
        """Trainable tensors of a task on this stage, under PEFT's names."""
        return self._task_parameters[task_id]

    def task_cuts(self, task_id: str) -> dict[str, Cut]:
        """What of each whole tensor of a task these parameters are."""
        return self._task_cuts[task_id]

    def forward(self, batch: MicrobatchTensors, hidden_TD: Tensor | None) -> Tensor:
        """Run a micro-batch through the stage.

        Args:
            batch: The micro-batch; the tasks of its spans have been added.
            hidden_TD: Output of the stage before, ``[T, D]``; None on the first stage.

        Returns:
            Hidden states ``[T, D]``, or on the last stage the sum of the negative log-likelihoods of each
            active task, ``[K]`` in the order of ``batch.spans``.
        """
        if self.embedding is not None:
            hidden_TD = self.embedding.forward(batch.tokens_T, batch.positions_T)
        assert hidden_TD is not None, "only the first stage embeds tokens itself"
        for layer in self._layers:
            hidden_TD = layer.forward(hidden_TD, batch)
        if self.head is None:
            return hidden_TD
        return self.head.forward(hidden_TD, batch)
