"""What a rank does before it trains: take its device, meet the others, load its stage, add the adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from muxtune.plan import Plan
from muxtune.support.allocator import keep_freed_memory
from muxtune.support.run_folder import FolderWatch
from runtime.backbone.held_bytes import parameter_bytes
from runtime.backbone.layers import Weights
from runtime.backbone.stage import Stage
from runtime.backbone.weights import open_weights
from runtime.data.faults import Faults
from runtime.data.feed import Feed, load_plan_data
from runtime.device.devices import RankDevice, rank_device
from runtime.device.process_memory import process_bytes
from runtime.device.torch_internals import default_store
from runtime.distributed.agreement import barrier, refuse_together
from runtime.distributed.meeting import patient_collectives
from runtime.distributed.mesh import RankMesh
from runtime.engine.job import RunJob
from runtime.tasks.adapter_files import initial_adapter, load_adapter
from runtime.tasks.outputs import ADAPTER_INIT, task_folder
from runtime.tasks.tenant import Tenant


@dataclass(frozen=True, slots=True)
class ReadyRank:
    """A rank that could begin to train."""

    rank: int
    device: RankDevice
    mesh: RankMesh
    """Place of the rank, and its groups."""
    feed: Feed
    """Micro-batches of the rank's replica."""
    stages: Mapping[int, Stage]
    """The stage's copy of the backbone for each instance."""
    tenants: Mapping[str, Tenant]
    """Tenants by task id, every task."""
    backbone_bytes: int
    """Bytes of the frozen weights of all instances."""
    process_start_bytes: int
    """Bytes that the process had right before the stage was built."""
    watch: FolderWatch
    """Notices that the run's folder is gone."""


def prepare_rank(plan: Plan, job: RunJob, rank: int) -> ReadyRank:
    """Make a rank ready; all ranks of the run have to, at the same time.

    Args:
        plan: Plan that has been checked.
        job: Job of the run.
        rank: Number of the rank; torch.distributed is up if there are several.

    Raises:
        UserError: The rank cannot have its device, or something that it reads has changed.
        PeerLostError: Another rank is gone.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    watch = FolderWatch(job.out_dir)
    device = rank_device(job.device, rank)
    with patient_collectives(job.peer_timeout_s):
        refuse_together(device.enter)  # takes a while on a GPU
        mesh = RankMesh(plan.parallelism, rank, job.peer_timeout_s, device)
        faults = Faults(rank, default_store() if dist.is_initialized() else None)
        feed = Feed(plan, load_plan_data(plan), device.name, replica=mesh.replica, faults=faults)
        weights = open_weights(plan.model)
        process_start_bytes = process_bytes()  # the libraries have been loaded
        stage = Stage(
            plan.model,
            plan.stage_layers(mesh.stage),
            first=mesh.first,
            last=mesh.last,
            weights=weights,
            device=device.name,
            shard=mesh.shard,
        )
        # Policies without a shared backbone pay for a copy of the stage per instance.
        first, *others = sorted({htask.instance for htask in plan.htasks})
        stages = {first: stage} | {instance: stage.copy() for instance in others}
        backbone_bytes = sum(parameter_bytes(each) for each in stages.values())
        tenants = _add_tasks(plan, job, rank, stages, device.name, weights)
    return ReadyRank(
        rank=rank,
        device=device,
        mesh=mesh,
        feed=feed,
        stages=stages,
        tenants=tenants,
        backbone_bytes=backbone_bytes,
        process_start_bytes=process_start_bytes,
        watch=watch,
    )


def _add_tasks(
    plan: Plan, job: RunJob, rank: int, stages: Mapping[int, Stage], device: str, weights: Weights
) -> dict[str, Tenant]:
    if job.first_step == 0:
        for task in plan.tasks[rank :: plan.parallelism.ranks]:
            folder = task_folder(job.out_dir, task.id) / ADAPTER_INIT
            initial_adapter(plan.model, task, folder, weights)
    barrier()
    tenants = {}
    for htask in plan.htasks:
        stage = stages[htask.instance]
        for task in plan.htask_tasks(htask.id):
            stage.add_task(task, load_adapter(task_folder(job.out_dir, task.id) / ADAPTER_INIT))
            parameters, portions = stage.task_parameters(task.id), stage.task_portions(task.id)
            tenants[task.id] = Tenant(
                task, parameters, portions, device=device, changed=partial(stage.renew, task.id)
            )
    return tenants
