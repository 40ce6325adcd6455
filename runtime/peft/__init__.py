"""PEFT methods beside the frozen backbone.

Each method is one module, registered in :data:`RUNTIME_METHODS`; the backbone asks :class:`TaskAdapter`
alone.
"""

from runtime.peft import bitfit, bottleneck, diff, ia3, lora, prefix_tuning, prompt_tuning, shira
from runtime.peft.adapter import Frozen, TaskAdapter
from runtime.peft.frozen_linear import Adder, frozen_linear
from runtime.peft.method import RUNTIME_METHODS, Content, FilePart, Reference, Run, RuntimeMethod

__all__ = [
    "RUNTIME_METHODS",
    "Adder",
    "Content",
    "FilePart",
    "Frozen",
    "Reference",
    "Run",
    "RuntimeMethod",
    "TaskAdapter",
    "bitfit",
    "bottleneck",
    "diff",
    "frozen_linear",
    "ia3",
    "lora",
    "prefix_tuning",
    "prompt_tuning",
    "shira",
]
