"""Workload, backbone and cluster of a command."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from muxtune.cluster import ClusterSpec, load_cluster
from muxtune.model import ModelSpec, is_pickled, load_model_spec, weight_files
from muxtune.support.errors import SpecError
from muxtune.tasks import Workload, load_workload


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """What is to be planned, and for which machine."""

    workload: Workload
    model: ModelSpec
    cluster: ClusterSpec


def load_inputs(workload: Path, model: str | None, cluster: str) -> PlanInputs:
    """Read and check a workload with its backbone and cluster.

    Args:
        workload: YAML file.
        model: Preset or directory; the workload's backbone by default.
        cluster: Preset or YAML file.

    Raises:
        UserError: Something is missing or wrong, or no backbone is named.
    """
    loaded = load_workload(workload)
    name = model or loaded.backbone
    if name is None:
        raise SpecError(f"{workload}: backbone", None, "a preset or Hugging Face directory (or --model)")
    spec = load_model_spec(name, loaded.dtype)
    return check_inputs(PlanInputs(loaded, spec, load_cluster(cluster)))


def check_inputs(inputs: PlanInputs) -> PlanInputs:
    """Refuse tasks that cannot run on the backbone, and pickled weights that are not the backbone's.

    Raises:
        UserError: Names the task or the tensor.
    """
    inputs.workload.check(inputs.model)
    if inputs.model.source != "preset":
        _check_weights(inputs.model)
    return inputs


def _check_weights(spec: ModelSpec) -> None:
    """Refuse pickled weights that are not the backbone's (others are checked); say if there are none."""
    files = weight_files(Path(spec.source))
    if not files:
        warnings.warn(f"{spec.source} has no weights: it can be planned, not run", stacklevel=3)
    elif is_pickled(files):
        from runtime.backbone.hugging_face import check_pickled  # only torch reads its own files

        check_pickled(spec)
