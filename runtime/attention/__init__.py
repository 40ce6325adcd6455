"""Causal attention inside each sequence of a flat token stream, by one of several backends.

=========  =====================================================================  ============================
name       how                                                                    where
=========  =====================================================================  ============================
grouped    sequences of near-equal length gathered into rows, a call per group    everywhere
loop       a call per sequence, without padding                                   everywhere
varlen     FlashAttention over all sequences in one call                          CUDA, float16 and bfloat16
flex       FlexAttention, whose mask is skipped by blocks                         CUDA; a CPU has no backward
masked     a dense mask over the whole stream: the reference of the others        everywhere
=========  =====================================================================  ============================

Under each of them, sequences attend to nothing but themselves, grouped queries and rotary positions work,
what belongs to no sequence comes out as zero, and sequences may go on from earlier micro-batches
(:mod:`runtime.attention.carried_kv`). A NaN stays in its sequence under those that say so
(``AttentionBackend.isolates``).
"""

from runtime.attention.backend import AttentionBackend, AttentionSite
from runtime.attention.backends import BACKENDS, attention_site, check_attention, refusals
from runtime.attention.plan import AttentionPlan, build_attention_plan, causal_attention
from runtime.attention.rope import RopeTables

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "AttentionPlan",
    "AttentionSite",
    "RopeTables",
    "attention_site",
    "build_attention_plan",
    "causal_attention",
    "check_attention",
    "refusals",
]
