"""Bytes that a stage of the backbone holds, whatever runs through it."""

from __future__ import annotations

from torch import nn

from runtime.backbone.layers import DecoderLayer


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers; of a stage, the frozen backbone without adapters."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def rotary_table_bytes(module: nn.Module) -> int:
    """Bytes of the rotary tables below a module; its layers share them."""
    tables = {
        id(layer.rope): layer.rope
        for layer in module.modules()
        if isinstance(layer, DecoderLayer) and layer.rope is not None
    }
    return sum(rope.cos.nbytes + rope.sin.nbytes + rope.inverse_sin.nbytes for rope in tables.values())
