"""The stage of the frozen backbone that a rank holds, with the adapters of all tasks."""

# T tokens of the stream, D hidden size, K active tasks

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from muxtune.model import ModelSpec
from muxtune.peft import EMBEDDING, Attachment, Site, TrainedTensor, attachments, embedding_attachments
from muxtune.support.errors import SpecError
from muxtune.tasks import PeftTask
from runtime.backbone.blocks import SiteAdapters
from runtime.backbone.families import FAMILY_PARTS
from runtime.backbone.hugging_face import hf_config
from runtime.backbone.layers import DecoderLayer, Embedding, Head, Weights
from runtime.backbone.linear import SharedLinear
from runtime.data.batch import MicrobatchTensors
from runtime.distributed.sharding import (
    INPUTS,
    OUTPUTS,
    WHOLE,
    Portion,
    Shard,
    entries_portion,
    linear_portions,
    name_part,
    tensor_portion,
)
from runtime.peft import RUNTIME_METHODS, FilePart, Frozen, TaskAdapter


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
        self.embedded = SiteAdapters()
        """Adapters on the output of the embedding."""
        parts = FAMILY_PARTS[spec.family]
        rope = parts.rope(spec, hf_config(spec), device)
        built = [parts.layer(spec, weights, i, rope, shard) for i in layers]
        self.embedding: Embedding | None = parts.embedding(spec, weights, shard) if first else None
        self.head: Head | None = parts.head(spec, weights, shard) if last else None
        self.layers = nn.ModuleList(built)
        self._layers: list[DecoderLayer] = built
        self._task_parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._task_portions: dict[str, dict[str, Portion]] = {}
        self._task_adapters: dict[str, list[TaskAdapter]] = {}
        self.to(device)

    def copy(self) -> Stage:
        """Another copy of the frozen weights; no task has been added yet."""
        assert not self._task_parameters, "tasks are of one copy"
        return copy.deepcopy(self, {id(self._shard): self._shard})  # with whom it sums is not copied

    def add_task(self, task: PeftTask, adapter: Mapping[str, Tensor]) -> None:
        """Attach the adapter of a task.

        Args:
            task: Task whose adapter it is.
            adapter: Tensors of its file, of the whole model, e.g. with
                ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``; what belongs to the layers
                of this stage, and to its shard, is copied.

        Raises:
            SpecError: A tensor is missing or has another shape than the task says.
        """
        self._task_parameters[task.id], self._task_portions[task.id] = {}, {}
        self._task_adapters[task.id] = []
        if self.embedding is not None:
            for each in embedding_attachments(task.peft, self._spec):
                self.embedded.attach(task.id, self._adapter(task, adapter, each, EMBEDDING, None, ()))
        for number, layer in zip(self._layer_numbers, self._layers, strict=True):
            there: dict[Site, tuple[TaskAdapter, ...]] = {}
            for each in attachments(task.peft, self._spec, number):
                linear = layer.linears[each.site.path] if each.site.kind == "linear" else None
                before = there.get(each.site, ())
                attached = self._adapter(task, adapter, each, number, linear, before)
                there[each.site] = (*before, attached)
                if linear is not None:
                    linear.attach(task.id, task.peft.method, each, attached)
                elif each.site.kind == "block":
                    layer.blocks[each.site.path].attach(task.id, attached)
                else:
                    layer.keys_values.attach(task.id, attached)
        self.renew(task.id)

    def renew(self, task_id: str) -> None:
        """Renew what follows from a task's trained tensors; all ranks of the shard, whenever they changed."""
        with torch.no_grad():
            terms = [(adapter, adapter.renew()) for adapter in self._task_adapters[task_id]]
            summed = [(adapter, term) for adapter, term in terms if term is not None]
            if not summed:
                return
            total = torch.cat([term.flatten() for _, term in summed])
            if self._shard.team is not None:
                self._shard.team.sum_(total)
            parts = total.split([term.numel() for _, term in summed])
            for (adapter, term), part in zip(summed, parts, strict=True):
                adapter.renewed(part.view(term.shape))

    def _adapter(
        self,
        task: PeftTask,
        given: Mapping[str, Tensor],
        each: Attachment,
        number: int,
        linear: SharedLinear | None,
        before: tuple[TaskAdapter, ...],
    ) -> TaskAdapter:
        """One of a task's adapters, with this rank's part of its tensors."""
        spec, shard, site = self._spec, self._shard, each.site
        method = RUNTIME_METHODS.get(task.peft.method)
        own: dict[str, nn.Parameter] = {}
        places_2N = None
        for tensor in each.tensors:
            part = method.file_part(each, tensor, number, spec)
            portion = tensor_portion(spec, site, tensor, shard)
            if part.places is not None:
                portion, places_2N = self._entries(task, given, each, tensor, part.places)
            own[tensor.name] = self._take(task, given, tensor, part, portion, number)
        inputs = Portion(INPUTS, site.in_features, ((0, site.in_features),))
        outputs = Portion(OUTPUTS, site.out_features, ((0, site.out_features),))
        path, columns, weight_OI, bias_O = spec.layer_prefix, (0, site.out_features), None, None
        if linear is not None:
            known = next(known for known in spec.linears if known.name == site.path)
            outputs, inputs = linear_portions(spec, known, shard)
            columns = linear.columns[site.path]
            weight_OI, bias_O = linear.part(site.path)
        if number != EMBEDDING:
            path = f"{path}.{number}.{site.path}"
        frozen = Frozen(
            model=spec,
            shard=shard,
            task=task,
            layer=number,
            path=path,
            inputs=inputs,
            outputs=outputs,
            columns=columns,
            weight_OI=weight_OI,
            bias_O=bias_O,
            before=before,
            places_2N=places_2N,
        )
        attached = method.attach(each, own, frozen)
        self._task_adapters[task.id].append(attached)
        return attached

    def _entries(
        self, task: PeftTask, given: Mapping[str, Tensor], each: Attachment, tensor: TrainedTensor, key: str
    ) -> tuple[Portion, Tensor]:
        """This rank's entries of a linear's weight, and their places in its part of it."""
        site, found = each.site, given.get(key)
        shape = (2, tensor.size)
        if found is None or found.shape != shape or found.is_floating_point():
            expected = f"whole numbers of shape {shape}"
            raise SpecError(
                f"adapter of {task.id}: {key}", None if found is None else tuple(found.shape), expected
            )
        places_2N = found.flip(0) if self._spec.transposed_weights else found
        sizes = torch.tensor([[site.out_features], [site.in_features]])
        if not ((places_2N >= 0) & (places_2N < sizes)).all():
            expected = f"places in {site.path}, which has {site.out_features} outputs of {site.in_features}"
            raise SpecError(f"adapter of {task.id}: {key}", int(found.max()), expected)
        return entries_portion(self._spec, site, places_2N, self._shard)

    def _take(
        self,
        task: PeftTask,
        given: Mapping[str, Tensor],
        tensor: TrainedTensor,
        place: FilePart,
        portion: Portion,
        number: int,
    ) -> nn.Parameter:
        """This rank's part of a tensor, as a parameter."""
        found = whole = given.get(place.key)
        name = place.key
        if place.start is not None and found is not None:
            name = name_part(place.key, number)
            fits = (
                found.dim() == len(tensor.shape)
                and place.start + tensor.shape[place.dim] <= found.shape[place.dim]
            )
            whole = found.narrow(place.dim, place.start, tensor.shape[place.dim]) if fits else found
        if found is None or whole is None or whole.shape != tensor.shape:
            shape = None if found is None else tuple(found.shape)
            expected = f"a tensor of shape {tensor.shape}"
            if place.start is not None:
                expected += f" from {place.start} on in dimension {place.dim}"
            raise SpecError(f"adapter of {task.id}: {place.key}", shape, expected)
        own = portion.take(whole.detach()).clone(memory_format=torch.contiguous_format)
        parameter = nn.Parameter(own.to(self._device))
        if place.start is not None:
            portion = portion.inside(place.dim, place.start, found.shape[place.dim], tensor.shape[place.dim])
        self._task_parameters[task.id][name] = parameter
        self._task_portions[task.id][name] = portion
        return parameter

    def task_parameters(self, task_id: str) -> dict[str, nn.Parameter]:
        """Trainable tensors of a task on this stage, under the names of its file; it may have none.

        Layers whose tensors are one in the file have parts of it, see
        :func:`runtime.distributed.sharding.name_part`.
        """
        return self._task_parameters[task_id]

    def task_portions(self, task_id: str) -> dict[str, Portion]:
        """What of each whole tensor of a task these parameters are."""
        return self._task_portions[task_id]

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
            change = partial(self.embedded.embed, batch=batch)
            hidden_TD = self.embedding.forward(batch.tokens_T, batch.positions_T, change)
        assert hidden_TD is not None, "only the first stage embeds tokens itself"
        for layer in self._layers:
            hidden_TD = layer.forward(hidden_TD, batch)
        if self.head is None:
            return hidden_TD
        return self.head.forward(hidden_TD, batch)
