"""Small models, datasets and plans that a test makes for itself, without planner and downloads."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from muxtune.batches import Alignment, htask_microbatches, measure_shape
from muxtune.cluster import load_cluster
from muxtune.model import ModelSpec
from muxtune.plan import HTask, IterationTokens, Parallelism, Plan, finish_plan, predict
from muxtune.schedule import StageTimes, Template, build_schedule, evaluate_schedule
from muxtune.tasks import PeftTask, Workload, load_task_data, load_tokenizer, with_digest
from tests.plans import plan_of

TINY_PRESETS = ("llama-tiny", "gpt2-tiny", "opt-tiny")
"""Presets whose weights any machine can hold, one of each family."""

CHARACTERS = "abcdefghij 0123456789=+"


def write_examples(path: Path, *, seed: int, count: int = 24, longest: int = 20) -> Path:
    """JSONL of random prompts of up to ``longest`` characters and short completions."""
    draw = random.Random(seed)

    def text(most: int) -> str:
        return "".join(draw.choice(CHARACTERS) for _ in range(draw.randint(1, most)))

    lines = [json.dumps({"prompt": text(longest), "completion": text(6)}) for _ in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def make_task(id_: str, dataset: Path, **changes: object) -> PeftTask:
    """A small LoRA task on a file; ``r`` and ``targets`` of its adapter and all other fields may change."""
    r, targets = changes.pop("r", 4), changes.pop("targets", ("q_proj", "v_proj"))
    fields: dict[str, object] = {
        "id": id_,
        "peft": {"method": "lora", "r": r, "alpha": 8, "targets": targets},
        "dataset": {"path": dataset},
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "max_length": 32,
        "learning_rate": 1e-2,
        "steps": 5,
    }
    return PeftTask.model_validate(fields | changes)


def make_boundless_model(folder: Path, source: Path) -> Path:
    """A copy of a Llama directory in which one weight of the last layer is infinite: no loss is finite."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    last = max(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[last][0, 0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def make_hf_model(folder: Path, family: str, *, layers: int = 4) -> Path:
    """A Hugging Face directory with random weights and a tokenizer of single characters."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    vocabulary = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(7)
    if family == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(vocabulary),
                n_embd=32,
                n_layer=layers,
                n_head=4,
                n_positions=128,
                bos_token_id=1,
                eos_token_id=2,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
    model.save_pretrained(folder)
    return folder


def make_plan(
    workload: Workload,
    model: ModelSpec,
    *,
    partition: Sequence[Sequence[str]],
    alignment: Alignment = "pack",
    chunk_tokens: int | None = None,
    template: Template = "continuous",
    pp: int = 2,
    shared_backbone: bool = True,
    policy: str = "muxtune",
    carry: int = 1,
    tp: int = 1,
    dp: int = 1,
) -> Plan:
    """A valid plan with made-up predictions.

    Args:
        workload: Its tasks.
        model: Backbone.
        partition: Task ids of each hTask; each hTask is a bucket of its own.
        alignment: Of all hTasks.
        chunk_tokens: For ``chunk``.
        template: Of the schedule.
        pp: Stages.
        shared_backbone: One copy for all hTasks, or one for each.
        policy: Its name.
        carry: Micro-batches over which the chunks of a sequence may spread.
        tp: Ranks that share a stage.
        dp: Replicas.
    """
    tasks = tuple(t.model_copy(update={"dataset": with_digest(t.dataset)}) for t in workload.tasks)
    tokenizer = load_tokenizer(model)
    data = {task.id: load_task_data(task, model, tokenizer) for task in tasks}
    htasks = []
    for position, ids in enumerate(partition):
        members = [data[i] for i in ids]
        m = -(-htask_microbatches(members) // (dp * carry)) * carry
        shape = measure_shape(members, alignment, chunk_tokens=chunk_tokens, microbatches=m * dp, carry=carry)
        htasks.append(
            HTask(
                id=position,
                task_ids=tuple(ids),
                alignment=alignment,
                chunk_tokens=chunk_tokens if alignment == "chunk" else None,
                microbatches=m,
                carry_microbatches=carry,
                tokens_per_microbatch=shape.tokens,
                instance=0 if shared_backbone else position,
            )
        )
    buckets = tuple((h,) for h in range(len(htasks)))
    microbatches = [h.microbatches for h in htasks]
    shown = 3 if template == "continuous" else 1
    steps = [min(shown, max(data[i].task.steps for i in ids)) for ids in partition]
    carries = [carry] * len(htasks)
    stages = build_schedule(buckets, microbatches, pp=pp, template=template, steps=steps, carries=carries)
    row = [1e-3] * len(htasks)
    times = StageTimes(fwd_s=[row] * pp, bwd_s=[row] * pp, p2p_s=row)
    layers = [model.layers // pp + (stage < model.layers % pp) for stage in range(pp)]
    plan = plan_of(
        model=model,
        cluster=load_cluster(f"cpu-{tp * pp * dp}"),
        policy=policy,
        parallelism=Parallelism(tp=tp, pp=pp, dp=dp, layers_per_stage=tuple(layers)),
        tasks=workload.tasks,
        htasks=htasks,
        buckets=buckets,
        template=template,
        actions=stages,
        predicted=predict(
            evaluate_schedule(stages, times),
            times=times,
            microbatches=microbatches,
            tokens=IterationTokens(all=1.0, billed=1.0, effective=1.0),
            peak_memory_bytes=[1] * pp,
        ),
    )
    return finish_plan(plan.with_derived(dataset_sha256=tuple(task.dataset.sha256 for task in tasks)))
