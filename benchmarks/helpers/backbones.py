"""Backbones of other widths than the presets have, with tasks and rough costs: what bars on sizes need."""

from __future__ import annotations

from experiments.workloads import mixed_workload
from muxtune.costs.roofline import RooflineCoefficients, RooflineCosts
from muxtune.model import ModelSpec, load_model_spec
from muxtune.tasks import Workload

_HEAD_DIM = 64
_FFN_RATIO = 43 / 16
"""Width of the MLP over that of the model, as in ``llama-tiny`` and LLaMA2-7B."""


def llama_of_width(hidden: int, layers: int) -> ModelSpec:
    """A Llama with grouped-query attention whose weights are drawn from a seed, like those of a preset.

    Args:
        hidden: Width; heads have 64 of it, two heads share keys and values.
        layers: Number of layers.
    """
    heads = 2 * max(1, hidden // _HEAD_DIM // 2)
    shape = {
        "name": f"llama-{hidden}x{layers}",
        "layers": layers,
        "hidden": hidden,
        "ffn": int(hidden * _FFN_RATIO),
        "heads": heads,
        "kv_heads": heads // 2,
        "head_dim": hidden // heads,
    }
    return ModelSpec.model_validate(load_model_spec("llama-tiny").model_dump() | shape)


def many_mixed_tasks(copies: int, *, steps: int, batches_divided_by: int = 1) -> Workload:
    """The eight mixed tasks of the speed comparisons several times over, each with its own seed.

    Args:
        copies: Copies of the eight.
        steps: Steps of each task.
        batches_divided_by: Global batches and micro-batches are smaller by this factor, but at least 1.
    """
    eight = mixed_workload(steps)
    tasks = [
        task.model_copy(
            update={
                "id": f"{task.id}-{copy}",
                "seed": task.seed + copy * len(eight.tasks),
                "global_batch_size": max(1, task.global_batch_size // batches_divided_by),
                "micro_batch_size": max(1, task.micro_batch_size // batches_divided_by),
            }
        )
        for copy in range(copies)
        for task in eight.tasks
    ]
    return eight.model_copy(update={"tasks": tuple(tasks)})


def rough_costs(model: ModelSpec) -> RooflineCosts:
    """Orders of magnitude of one core of a server, to choose between plans: the same choice everywhere."""
    coefficients = RooflineCoefficients(
        device="cpu",
        launch_s=10e-6,
        flops_per_s=150e9,
        bytes_per_s=10e9,
        overlap=2.0,
        link_latency_s=50e-6,
        link_bytes_per_s=2e9,
        error=0.3,
    )
    return RooflineCosts(coefficients, model)
