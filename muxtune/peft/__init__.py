"""PEFT methods in the domain: what a task attaches to the frozen backbone, and what that costs.

Each method is one module, registered in :data:`METHODS`; all others ask :class:`Attachment` alone.
"""

from muxtune.peft import (
    bitfit,
    bottleneck,
    diff,
    ia3,
    prefix_tuning,
    prompt_tuning,
    shira,
)  # they register themselves
from muxtune.peft.layers import (
    LayerRuns,
    Layers,
    Specs,
    backward_layers,
    count_layers,
    first_trained,
    layer_classes,
    runs_of,
    stage_attachments,
    stage_layers,
    stages_layers,
)
from muxtune.peft.lora import PLAIN_KIND, at_first_linear, everywhere
from muxtune.peft.method import (
    METHODS,
    AnyPeft,
    PeftMethod,
    all_kinds,
    attachments,
    check_peft,
    embedding_attachments,
    extra,
    mixed_size,
)
from muxtune.peft.representation import NOTHING, Attachment, Extra, TrainedTensor
from muxtune.peft.sites import (
    EMBEDDING,
    Site,
    Step,
    depth_of,
    embedding_site,
    layer_sites,
    linear_sites,
    needs_backward,
    site_of,
)
from muxtune.peft.spec import LayeredSpec, PeftSpec, Targets
from muxtune.peft.start import start_digest
from muxtune.peft.targets import TargetedSpec, module_path, targeted_paths

__all__ = [
    "EMBEDDING",
    "METHODS",
    "NOTHING",
    "PLAIN_KIND",
    "AnyPeft",
    "Attachment",
    "Extra",
    "LayerRuns",
    "LayeredSpec",
    "Layers",
    "PeftMethod",
    "PeftSpec",
    "Site",
    "Specs",
    "Step",
    "TargetedSpec",
    "Targets",
    "TrainedTensor",
    "all_kinds",
    "at_first_linear",
    "attachments",
    "backward_layers",
    "bitfit",
    "bottleneck",
    "check_peft",
    "count_layers",
    "depth_of",
    "diff",
    "embedding_attachments",
    "embedding_site",
    "everywhere",
    "extra",
    "first_trained",
    "ia3",
    "layer_classes",
    "layer_sites",
    "linear_sites",
    "mixed_size",
    "module_path",
    "needs_backward",
    "prefix_tuning",
    "prompt_tuning",
    "runs_of",
    "shira",
    "site_of",
    "stage_attachments",
    "stage_layers",
    "stages_layers",
    "start_digest",
    "targeted_paths",
]
