"""CUDA-only kernels on a CPU: what surrounds them can be checked without a GPU."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
import torch.nn.attention.flex_attention
import torch.nn.attention.varlen
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation


def varlen_by_sequence(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False
):
    """What torch documents of ``varlen_attn``, causal, with a dense mask per sequence."""
    assert window_size == (-1, 0)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key))
    parts = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]].transpose(0, 1)
        k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]].transpose(0, 1) for x in (key, value))
        lower_right = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=lower_right, enable_gqa=enable_gqa
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def let_every_backend_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """``varlen`` by the function above; ``flex`` uncompiled, whose backward torch only forbids on a CPU."""
    torch._dynamo.reset()  # it keeps so many shapes and no more
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_by_sequence)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
