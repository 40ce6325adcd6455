"""Writes folders as the Vidur simulator publishes them (its docs/profiling.md), out of given shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

STATISTICS = ("min", "max", "mean", "median", "std")
PRODUCTS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
POINTWISE = ("emb", "input_layernorm", "attn_rope", "post_attention_layernorm", "mlp_act", "add")


class Shapes(NamedTuple):
    """Of a published model."""

    folder: str
    heads: int
    kv_heads: int
    hidden: int
    ffn: int
    gated: bool


LLAMA2_7B = Shapes("meta-llama/Llama-2-7b-hf", 32, 32, 4096, 11008, True)
LLAMA3_8B = Shapes("meta-llama/Meta-Llama-3-8B", 32, 8, 4096, 14336, True)
CODELLAMA_34B = Shapes("codellama/CodeLlama-34b-Instruct-hf", 64, 8, 8192, 22016, True)
PHI_2 = Shapes("microsoft/phi-2", 32, 32, 2560, 10240, False)


def statistics(op: str, median_ms: float) -> dict[str, float]:
    """The five columns of an operator."""
    values = (0.9 * median_ms, 1.2 * median_ms, 1.01 * median_ms, median_ms, 0.02 * median_ms)
    return {f"time_stats.{op}.{name}": value for name, value in zip(STATISTICS, values, strict=True)}


def compute_rows(model: Shapes, tokens: Sequence[int], tps: Sequence[int]) -> list[dict[str, object]]:
    """Rows of ``mlp.csv`` with times that tell operator, tokens and workers."""
    norms = 2 if model.gated else 1
    ops = (*PRODUCTS, *(op for op in POINTWISE if norms > 1 or op != "post_attention_layernorm"))
    rows: list[dict[str, object]] = []
    for tp in tps:
        for count in sorted(tokens, reverse=True):
            times: dict[str, object] = {}
            for place, op in enumerate(ops, start=1):
                times |= statistics(op, place + count / 10_000 + tp / 100)
            rows.append(
                times
                | {"n_head": model.heads, "n_kv_head": model.kv_heads, "n_embd": model.hidden}
                | {"n_expanded_embd": model.ffn, "vocab_size": 32768, "use_gated_mlp": model.gated}
                | {"num_tokens": count, "num_tensor_parallel_workers": tp}
            )
    return rows


def attention_rows(model: Shapes, tp: int) -> list[dict[str, object]]:
    """Rows of ``attention.csv``: a chunk of a prompt, and a decoding batch, each without the other's."""
    common = {"n_embd": model.hidden, "n_q_head": model.heads, "n_kv_head": model.kv_heads, "block_size": 16}
    common |= {"num_tensor_parallel_workers": tp, "max_model_len": 4096}
    end = {"attention_backend": "AttentionBackend.FLASHINFER"}
    prefill = statistics("attn_input_reshape", 0.0) | statistics("attn_prefill", 0.25)
    decode = statistics("attn_input_reshape", 0.001) | statistics("attn_decode", 0.016)
    return [
        prefill | common | {"batch_size": 1, "prefill_chunk_size": 512, "kv_cache_size": 1024} | end,
        decode | common | {"batch_size": 16, "prefill_chunk_size": 0, "kv_cache_size": 32} | end,
    ]


def collective_rows(collective: str, workers: int, sizes: Mapping[int, float]) -> list[dict[str, object]]:
    """Rows of ``all_reduce.csv`` or ``send_recv.csv``, median ms by bytes."""
    end = {"collective": collective, "devices_per_node": workers, "max_devices_per_node": 4}
    return [
        statistics(collective, ms) | {"rank": 0, "num_workers": workers, "size": size} | end
        for size, ms in sizes.items()
    ]


def write_csv(path: Path, rows: Sequence[Mapping[str, object]], *, index: bool = False) -> Path:
    """Write a file; those of the network have an index in front."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=index)
    return path


def write_layout(root: Path, *, devices: Sequence[str] = ("a40", "a100")) -> Path:
    """Two models and two topologies of each device below ``root``."""
    for device in devices:
        compute, network = root / "compute" / device, root / "network"
        write_csv(compute / LLAMA3_8B.folder / "mlp.csv", compute_rows(LLAMA3_8B, (1, 64, 4096), (1, 8)))
        write_csv(compute / LLAMA3_8B.folder / "attention.csv", attention_rows(LLAMA3_8B, 2))
        write_csv(compute / PHI_2.folder / "mlp.csv", compute_rows(PHI_2, (8, 512), (1,)))
        reduce_rows = collective_rows("all_reduce", 2, {2048: 0.02, 1 << 32: 9.0})
        write_csv(network / f"{device}_pairwise_nvlink" / "all_reduce.csv", reduce_rows, index=True)
        sent_rows = collective_rows("send_recv", 2, {2048: 0.01})
        write_csv(network / f"{device}_dgx" / "send_recv.csv", sent_rows, index=True)
    return root
