"""Bytes that a rank of a pipeline stage needs at its peak, by what they are for.

* frozen weights and tables, per copy of the backbone
* adapters with AdamW's moments, and their gradients from an hTask's first backward to its step
* activations and logits that the micro-batches in flight keep for their backward
* keys and values that sequences carry from chunk to chunk, messages, temporaries, a GPU allocator's gaps
"""

from muxtune.memory.carried import carried_gradient_bytes, carried_kv_bytes
from muxtune.memory.htask_bytes import HTaskLoad, MicrobatchLoad, htask_load
from muxtune.memory.saved_activations import KeptBytes, kept_bytes
from muxtune.memory.stage import CUDA_ALLOCATOR_FRACTION, StageLoad, StageMemory
from muxtune.memory.weights import Sharding, adapter_parameters, backbone_bytes, table_bytes
from muxtune.memory.workspace import backward_workspace_bytes, forward_workspace_bytes

__all__ = [
    "CUDA_ALLOCATOR_FRACTION",
    "HTaskLoad",
    "KeptBytes",
    "MicrobatchLoad",
    "Sharding",
    "StageLoad",
    "StageMemory",
    "adapter_parameters",
    "backbone_bytes",
    "backward_workspace_bytes",
    "carried_gradient_bytes",
    "carried_kv_bytes",
    "forward_workspace_bytes",
    "htask_load",
    "kept_bytes",
    "table_bytes",
]
