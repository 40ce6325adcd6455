"""Tasks as unlike each other as their fields allow, for runs that are compared with solo runs."""

from __future__ import annotations


def lora(r: int, alpha: float, *targets: str) -> dict[str, object]:
    return {"method": "lora", "r": r, "alpha": alpha, "targets": list(targets)}


def task(path: str, batch: tuple[int, int], peft: dict[str, object], **fields: object) -> dict[str, object]:
    defaults = {
        "global_batch_size": batch[0],
        "micro_batch_size": batch[1],
        "steps": 20,
        "learning_rate": 2e-3,
    }
    return defaults | {"dataset": {"path": path}, "peft": peft} | fields


TASKS: dict[str, dict[str, object]] = {
    # prompts that are cut on the left; two micro-batches of four
    "rank1": task("long.jsonl", (8, 4), lora(1, 2, "q_proj", "v_proj"), max_length=24, seed=1),
    # ten examples: 80 sequences are eight epochs, and every batch takes from two of them
    "rank3": task("few.jsonl", (4, 1), lora(3, 7, "all-linear"), max_length=48, seed=2**40 + 5, shuffle=True),
    # all tokens are targets; gradients are clipped in every step
    "rank8": task(
        "plain.jsonl",
        (4, 2),
        lora(8, 16, "gate_proj", "up_proj", "down_proj"),
        max_length=40,
        seed=3,
        max_grad_norm=0.05,
    ),
    # one micro-batch alone: its two sequences leave two of its neighbours' four micro-batches empty
    "rank64": task(
        "long.jsonl",
        (2, 2),
        lora(64, 32, "k_proj", "o_proj"),
        max_length=64,
        seed=4,
        learning_rate=5e-3,
        weight_decay=0.1,
        lr_schedule="linear",
        warmup_steps=4,
    ),
    # leaves its hTask after 8 of 20 steps
    "brief": task(
        "short.jsonl",
        (6, 3),
        lora(4, 8, "self_attn.q_proj", "down_proj"),
        max_length=32,
        seed=5,
        steps=8,
        lr_schedule="cosine",
        shuffle=True,
    ),
    # an hTask that leaves the rotation; clipped, scheduled and decayed at once
    "aside": task(
        "short.jsonl",
        (4, 4),
        lora(2, 4, "all-linear"),
        max_length=32,
        seed=6,
        steps=14,
        max_grad_norm=0.2,
        weight_decay=0.05,
        lr_schedule="cosine",
        warmup_steps=3,
    ),
    # neighbours that no one would want: exploding, and as different from the others as can be
    "wild": task(
        "long.jsonl", (8, 2), lora(16, 512, "all-linear"), max_length=64, seed=7, learning_rate=10.0
    ),
    "tiny": task("plain.jsonl", (1, 1), lora(5, 1, "v_proj"), max_length=40, seed=8, learning_rate=1e-6),
    # long and fast enough for the rounding of float32 to grow
    "steep": task(
        "long.jsonl", (8, 4), lora(8, 16, "all-linear"), max_length=64, seed=18, steps=60, learning_rate=3e-2
    ),
    # for GPT-2, whose linears have other names
    "fused-qkv": task("short.jsonl", (4, 2), lora(8, 16, "c_attn"), max_length=32, seed=9, max_grad_norm=0.1),
    "both-proj": task("long.jsonl", (6, 2), lora(3, 6, "c_proj"), max_length=64, seed=10, shuffle=True),
    "all-gpt2": task(
        "plain.jsonl", (2, 1), lora(16, 16, "all-linear"), max_length=40, seed=11, steps=8, weight_decay=0.1
    ),
    # for OPT, whose linears have names of their own
    "qv-fc1": task(
        "short.jsonl",
        (4, 2),
        lora(8, 16, "q_proj", "v_proj", "fc1"),
        max_length=32,
        seed=15,
        max_grad_norm=0.1,
    ),
    "out-fc2": task(
        "long.jsonl", (6, 2), lora(3, 6, "self_attn.out_proj", "fc2"), max_length=64, seed=16, shuffle=True
    ),
    # bytes are many tokens
    "bytes-short": task("short.jsonl", (4, 2), lora(8, 16, "all-linear"), max_length=40, seed=12),
    "bytes-long": task(
        "long.jsonl", (2, 1), lora(4, 8, "mlp.down_proj", "q_proj"), max_length=72, seed=13, shuffle=True
    ),
    "bytes-gpt2": task("long.jsonl", (2, 1), lora(4, 8, "mlp.c_proj"), max_length=72, seed=14, shuffle=True),
    "bytes-opt": task("long.jsonl", (2, 1), lora(4, 8, "v_proj", "fc1"), max_length=72, seed=17),
}

_NAMES = {
    "llama": ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"),
    "opt": ("q_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
"""Linears by family: one that gives queries, one values, the attention's last, the MLP's first and last."""

METHODS = ("dora", "ia3", "bitfit", "shira", "diff", "serial", "parallel", "prefix", "prompt")
"""Tenants of every method beside LoRA's own."""

_FIELDS: dict[str, tuple[tuple[int, int], dict[str, object]]] = {
    "dora": ((4, 2), {"seed": 21, "max_grad_norm": 0.5}),
    "ia3": ((4, 1), {"seed": 22, "learning_rate": 5e-3}),
    "bitfit": ((4, 2), {"seed": 23, "max_length": 40}),
    "shira": ((2, 2), {"seed": 24, "shuffle": True}),
    "diff": ((4, 2), {"seed": 25, "weight_decay": 0.1}),
    "serial": ((4, 4), {"seed": 26, "max_grad_norm": 0.5, "max_length": 48}),
    "parallel": ((2, 1), {"seed": 27, "lr_schedule": "cosine", "warmup_steps": 3}),
    "prefix": ((4, 2), {"seed": 28, "learning_rate": 1e-2}),
    "prompt": ((2, 1), {"seed": 29, "learning_rate": 1e-2, "shuffle": True, "max_length": 56}),
}


def tenant(method: str, family: str) -> dict[str, object]:
    """A task of a method on a family of backbones."""
    query, value, attended, inner, outer = _NAMES[family]
    peft = {
        "dora": lora(3, 6, value, outer) | {"use_dora": True, "use_rslora": True},
        "ia3": {"method": "ia3", "targets": [value, outer], "feedforward": [outer]},
        "bitfit": {"method": "bitfit"},
        "shira": {"method": "shira", "r": 2, "targets": [query, inner, outer]},
        "diff": {"method": "diff", "density": 0.05, "targets": [query, attended, outer]},
        "serial": {"method": "bottleneck", "size": 6},
        "parallel": {
            "method": "bottleneck",
            "size": 5,
            "placement": "parallel",
            "activation": "silu",
            "scale": 4,
        },
        "prefix": {"method": "prefix_tuning", "num_virtual_tokens": 5},
        "prompt": {"method": "prompt_tuning", "num_virtual_tokens": 3},
    }[method]
    batch, fields = _FIELDS[method]
    return task("long.jsonl", batch, peft, **({"max_length": 64} | fields))


TASKS |= {f"{method}-{family}": tenant(method, family) for family in _NAMES for method in METHODS}
