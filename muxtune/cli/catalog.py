"""``models``, ``clusters`` and ``policies``: what is available."""

from __future__ import annotations

from pydantic import BaseModel

from muxtune.cli.options import JsonFlag
from muxtune.cli.output import emit
from muxtune.cluster import ClusterSpec, cluster_names, load_cluster
from muxtune.model import PRESETS, ModelSpec
from muxtune.tables import format_table, show_bytes


class ModelList(BaseModel):
    """What ``muxtune models --json`` prints."""

    models: list[ModelSpec]


class ClusterList(BaseModel):
    """What ``muxtune clusters --json`` prints."""

    clusters: list[ClusterSpec]


class PolicySummary(BaseModel):
    """One policy."""

    name: str
    summary: str


class PolicyList(BaseModel):
    """What ``muxtune policies --json`` prints."""

    policies: list[PolicySummary]


def models(as_json: JsonFlag = False) -> None:
    """List the preset backbones; a Hugging Face directory (Llama, GPT-2) works as well."""
    specs = list(PRESETS.values())
    header = [
        "model",
        "family",
        "layers",
        "hidden",
        "heads",
        "kv heads",
        "ffn",
        "vocab",
        "positions",
        "parameters",
    ]
    sizes = [
        (m.layers, m.hidden, m.heads, m.kv_heads, m.ffn, m.vocab, m.max_positions, m.parameters)
        for m in specs
    ]
    rows = [[m.name, m.family, *(f"{n:,}" for n in ns)] for m, ns in zip(specs, sizes, strict=True)]
    emit(ModelList(models=specs), format_table(header, rows), as_json=as_json)


def clusters(as_json: JsonFlag = False) -> None:
    """List the preset clusters; a YAML file works as well."""
    specs = [load_cluster(name) for name in cluster_names()]
    rows = [
        [c.name, c.device.name, str(c.ranks), show_bytes(c.device.memory_bytes), c.link.name] for c in specs
    ]
    table = format_table(["cluster", "device", "ranks", "memory per rank", "link"], rows)
    emit(ClusterList(clusters=specs), table, as_json=as_json)


def policies(as_json: JsonFlag = False) -> None:
    """List the policies, those of installed packages included."""
    from muxtune.policies import POLICIES

    found = [PolicySummary(name=name, summary=POLICIES.get(name).summary) for name in POLICIES.names()]
    width = max(len(policy.name) for policy in found)
    text = "\n".join(f"{policy.name.ljust(width)}  {policy.summary}" for policy in found)
    emit(PolicyList(policies=found), text, as_json=as_json)
