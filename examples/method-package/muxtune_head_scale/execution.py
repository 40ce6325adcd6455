"""What the method does: its adapter at a linear, its files, and a task alone in plain torch."""

# t tokens of one task, H heads of a rank, I their features

from __future__ import annotations

import json

import torch
from torch import nn

from muxtune.peft import attachments
from runtime.peft import FilePart, TaskAdapter


def scaled(x_tI, scale_H):
    """Every head's features times its number, in the dtype of ``x_tI``."""
    x_tHD = x_tI.unflatten(-1, (len(scale_H), -1))
    return (x_tHD * scale_H[:, None]).flatten(-2).to(x_tI.dtype)


class HeadScaleAdapter(TaskAdapter):
    """One task's numbers at one layer."""

    def __init__(self, scale_H):
        self.scale_H = scale_H

    def dispatch(self, x_tI):
        """What the output projection reads instead of its input."""
        return scaled(x_tI, self.scale_H)


class Alone:
    """A task alone: a hook in the model of transformers."""

    def __init__(self, backbone, task, model):
        self.module = backbone.eval().requires_grad_(False)
        self._scales = {key: nn.Parameter(tensor) for key, tensor in _ones(task.peft, model).items()}
        for number, (key, scale) in enumerate(self._scales.items()):
            linear = backbone.get_submodule(key.removesuffix(".head_scale"))
            linear.register_forward_pre_hook(lambda m, x, scale=scale: (scaled(x[0], scale), *x[1:]))
            backbone.register_parameter(f"head_scale_{number}", scale)

    def state(self):
        """The adapter under the keys of its file."""
        return {key: scale.detach().clone() for key, scale in self._scales.items()}

    def enter(self, step, first, lengths):
        """Nothing to prepare: no dropout."""


class HeadScaleRuntime:
    """The method in the runtime."""

    def attach(self, each, tensors, frozen):
        """``tensors`` are the rank's parts."""
        return HeadScaleAdapter(tensors["head_scale"])

    def adder(self, adapters, keys_T):
        """Nothing is added beside a linear."""
        return None

    def file_part(self, each, tensor, layer, model):
        """Name of a tensor in ``adapter_model.safetensors``."""
        return FilePart(f"{model.layer_prefix}.{layer}.{each.site.path}.{tensor.name}")

    def initial(self, skeleton, task, model, folder):
        """Ones: training begins with the plain backbone."""
        config = {"peft_type": "HEAD_SCALE", "base_model_name_or_path": skeleton.name_or_path}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return _ones(task.peft, model)

    def reference(self, backbone, task, model):
        """What a run is validated against."""
        return Alone(backbone, task, model)

    def builders(self):
        """Operators for the profiler."""
        return {"head_scale": _build}


def _ones(spec, model):
    dtype = torch.promote_types(getattr(torch, model.dtype), torch.float32)
    return {
        f"{model.layer_prefix}.{layer}.{each.site.path}.head_scale": torch.ones(model.heads, dtype=dtype)
        for layer in range(model.layers)
        for each in attachments(spec, model, layer)
    }


def _build(content, heads, width, tokens):
    x_tI = content.normal(tokens, heads * width, requires_grad=True)
    scale_H = content.normal(heads).requires_grad_()
    output = scaled(x_tI, scale_H)
    gradient = content.normal(tokens, heads * width)

    def backward():
        return torch.autograd.grad(output, [x_tI, scale_H], gradient, retain_graph=True)

    return lambda: scaled(x_tI, scale_H), backward
