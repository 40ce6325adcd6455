"""A plan and its prediction in words and tables."""

from __future__ import annotations

from muxtune.plan import HTask, Plan, Predicted
from muxtune.planning.exact.bytes import plan_memory
from muxtune.planning.search.explain import Explanation
from muxtune.support.tables import (
    format_table,
    show_bytes,
    show_difference,
    show_percent,
    show_rate,
    show_seconds,
)
from muxtune.tasks import load_task_data, load_tokenizer


def plan_summary(plan: Plan) -> str:
    """What was decided, and what is expected of it. Reads the datasets."""
    p = plan.parallelism
    layers = " + ".join(map(str, p.layers_per_stage))
    mesh = f"tp {p.tp}, dp {p.dp}, " if p.tp * p.dp > 1 else ""
    idle = f", {plan.idle_ranks} of {plan.cluster.ranks} ranks idle" if plan.idle_ranks else ""
    head = (
        f"{plan.policy}: {_count(len(plan.tasks), 'task')} in {_count(len(plan.htasks), 'hTask')}, "
        f"{_count(len(plan.buckets), 'bucket')}, {plan.template} template\n"
        f"{plan.model.name} on {plan.cluster.name}: {mesh}{_count(p.pp, 'stage')} with {layers} layers"
        f"{idle}; costs {plan.costs.profile_id}"
    )
    device = plan.cluster.device
    head += f"\nmemory per rank {show_bytes(device.memory_bytes)}"
    if device.reserved_bytes:
        head += f", beside {show_bytes(device.reserved_bytes)} that are reserved for interpreter and drivers"
    head += "".join(f"\nnote on costs: {note}" for note in plan.derived.cost_notes)
    tables = [
        _htask_table(plan),
        _token_table(plan),
        predicted_table(plan.predicted, plan),
        _memory_table(plan),
    ]
    return "\n\n".join([head, *filter(None, tables)])


def predicted_table(predicted: Predicted, plan: Plan) -> str:
    """The numbers of a plan's prediction, with the lower bound beside the iteration time, and idle ranks."""
    idle = [["ranks idle", f"{plan.idle_ranks} of {plan.cluster.ranks}"]] if plan.idle_ranks else []
    rows = [
        ["iteration", show_seconds(predicted.iteration_s)],
        ["lower bound (busiest stage)", show_seconds(predicted.lower_bound_s)],
        ["above the lower bound", show_difference(predicted.iteration_s, predicted.lower_bound_s)],
        ["tokens/s", show_rate(predicted.tokens_per_s)],
        ["billed tokens/s", show_rate(predicted.billed_tokens_per_s)],
        ["effective tokens/s", show_rate(predicted.effective_tokens_per_s)],
        *([] if predicted.mfu is None else [["MFU", show_percent(predicted.mfu)]]),
        *idle,
        ["bubble", show_percent(predicted.bubble_fraction)],
        *(
            [["bubble in theory", show_percent(predicted.theoretical_bubble_fraction)]]
            if predicted.theoretical_bubble_fraction is not None
            else []
        ),
        ["peak memory per stage", ", ".join(map(show_bytes, predicted.peak_memory_bytes))],
    ]
    return format_table(["predicted", ""], rows)


def _token_table(plan: Plan) -> str:
    """Tokens of an iteration as planned, and if the same hTasks were aligned in one way only."""
    report = plan.predicted.alignment
    if report is None:
        return ""
    chunks = ", ".join(map(str, sorted(set(report.chunk_tokens))))
    named = {"planned": report.plan, "pad": report.pad, "pack": report.pack, f"chunk {chunks}": report.chunk}
    rows = [
        [name, f"{t.all:,}", f"{t.effective:,.0f}", f"{t.billed:,}", f"{t.ineffective:,.0f}"]
        for name, t in named.items()
    ]
    header = ["tokens per iteration", "all", "effective", "billed", "ineffective"]
    return format_table(header, rows)


def explanation_table(explanation: Explanation) -> str:
    """The winner's time by what it goes into, and what each runner-up loses on what."""
    parts = explanation.parts
    head = (
        f"searched {explanation.partitions} partitions, {explanation.looked_at} exactly; the winner:\n"
        f"{explanation.winner}: {show_seconds(explanation.iteration_s)} = "
        f"{show_seconds(parts.working_s)} working + {show_seconds(parts.padding_s)} padding + "
        f"{show_seconds(parts.communication_s)} communication + {show_seconds(parts.waiting_s)} waiting"
    )
    rows = [
        [
            f"{row.differs_in}: {row.choice}",
            show_seconds(row.iteration_s),
            f"{row.slower:+.1%}",
            *(
                f"{1e3 * lost_s:+.1f}"
                for lost_s in (row.utilisation_s, row.padding_s, row.communication_s, row.bubble_s)
            ),
            f"lacks {show_bytes(row.missing_bytes)}" if row.missing_bytes else "fits",
            row.lost_on,
        ]
        for row in explanation.runners_up
    ]
    if explanation.not_played:
        meshes = (f"{mesh} (about {show_seconds(s)})" for mesh, s in explanation.not_played.items())
        head += f"\nnot played, by estimate: {'; '.join(meshes)}"
    header = ["runner-up", "iteration", "slower", "utilization ms", "padding", "communication", "bubble"]
    return f"{head}\n\n{format_table([*header, 'memory', 'lost on'], rows)}"


def _memory_table(plan: Plan) -> str:
    """What each stage's memory is for, at its fullest moment."""
    rows = [
        [
            f"stage {stage}",
            show_bytes(memory.total_bytes),
            show_bytes(memory.backbone_bytes + memory.table_bytes),
            show_bytes(memory.adapter_bytes + memory.gradient_bytes + memory.optimizer_bytes),
            show_bytes(memory.activation_bytes + memory.chunk_kv_bytes),
            show_bytes(memory.logit_bytes),
            show_bytes(memory.message_bytes),
            show_bytes(memory.workspace_bytes + memory.allocator_bytes),
        ]
        for stage, memory in enumerate(plan_memory(plan))
    ]
    header = ["memory", "total", "backbone", "adapters", "activations", "logits", "messages", "temporaries"]
    return format_table(header, rows)


def _htask_table(plan: Plan) -> str:
    bucket_of = {htask: number for number, bucket in enumerate(plan.buckets) for htask in bucket}
    effective = _effective_tokens(plan)
    rows = []
    for htask in plan.htasks:
        effective_tokens = sum(effective[task_id] for task_id in htask.task_ids)
        ineffective = 1 - effective_tokens / plan.step_tokens(htask.id)
        rows.append(
            [
                f"{htask.id}: {' + '.join(htask.task_ids)}",
                str(htask.microbatches),
                str(htask.tokens_per_microbatch),
                _alignment(htask),
                show_percent(ineffective),
                str(bucket_of[htask.id]),
            ]
        )
    header = ["hTask", "micro-batches", "tokens in each", "alignment", "ineffective", "bucket"]
    return format_table(header, rows)


def _alignment(htask: HTask) -> str:
    if htask.alignment != "chunk":
        return htask.alignment
    carried = f" over {htask.carry_microbatches}" if htask.carry_microbatches > 1 else ""
    return f"chunk {htask.chunk_tokens}{carried}"


def _effective_tokens(plan: Plan) -> dict[str, float]:
    """Tokens of examples per step and task, the mean over its steps."""
    tokenizer = load_tokenizer(plan.model)
    data = {task.id: load_task_data(task, plan.model, tokenizer) for task in plan.tasks}
    return {task_id: each.step_tokens for task_id, each in data.items()}


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
