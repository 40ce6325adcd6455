"""Backbones by name: tiny ones that train on a CPU within seconds, and published ones."""

from __future__ import annotations

from muxtune.model.families import FAMILIES
from muxtune.model.spec import ModelSpec

BYTE_VOCAB = 264
"""256 bytes, BOS, EOS and padding, rounded up to a multiple of 8."""


def _preset(family: str, name: str, **shape: object) -> ModelSpec:
    common = {"name": name, "family": family, "source": "preset", "norm_eps": 1e-5}
    return ModelSpec.model_validate(common | dict(FAMILIES[family].preset) | shape)


def _tiny(family: str, name: str, **shape: object) -> ModelSpec:
    return _preset(
        family,
        name,
        hidden=256,
        heads=8,
        head_dim=32,
        vocab=BYTE_VOCAB,
        max_positions=1024,
        dtype="float32",
        **shape,
    )


def _published(family: str, name: str, **shape: object) -> ModelSpec:
    return _preset(family, name, dtype="bfloat16", **shape)


PRESETS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _tiny("llama", "llama-tiny", layers=8, kv_heads=4, ffn=688),
        _tiny("gpt2", "gpt2-tiny", layers=6, kv_heads=8, ffn=1024),
        _tiny("opt", "opt-tiny", layers=6, kv_heads=8, ffn=1024),
        # arXiv 2005.14165, table 2.1, with GPT-2's vocabulary
        _published(
            "gpt2",
            "gpt3-2.7b",
            layers=32,
            hidden=2560,
            ffn=10_240,
            heads=32,
            kv_heads=32,
            head_dim=80,
            vocab=50_257,
            max_positions=2048,
        ),
        # arXiv 2307.09288, table 1; the widths of the MLP stand in the published configurations alone
        _published(
            "llama",
            "llama2-7b",
            layers=32,
            hidden=4096,
            ffn=11_008,
            heads=32,
            kv_heads=32,
            head_dim=128,
            vocab=32_000,
            max_positions=4096,
        ),
        _published(
            "llama",
            "llama2-13b",
            layers=40,
            hidden=5120,
            ffn=13_824,
            heads=40,
            kv_heads=40,
            head_dim=128,
            vocab=32_000,
            max_positions=4096,
        ),
        # arXiv 2407.21783, table 3
        _published(
            "llama",
            "llama3-8b",
            layers=32,
            hidden=4096,
            ffn=14_336,
            heads=32,
            kv_heads=8,
            head_dim=128,
            vocab=128_256,
            max_positions=8192,
            rope_theta=500_000.0,
        ),
        # arXiv 2205.01068, table 1
        _published(
            "opt",
            "opt-30b",
            layers=48,
            hidden=7168,
            ffn=28_672,
            heads=56,
            kv_heads=56,
            head_dim=128,
            vocab=50_272,
            max_positions=2048,
        ),
    )
}
