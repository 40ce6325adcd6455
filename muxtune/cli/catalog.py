"""``models``, ``clusters`` and ``policies``: what is available."""

from __future__ import annotations

from typing import Annotated

import typer
import yaml
from pydantic import BaseModel, computed_field

from muxtune.cli.options import JsonFlag, WideFlag
from muxtune.cli.output import emit
from muxtune.cluster import ClusterSpec, cluster_names, load_cluster
from muxtune.model import PRESETS, ModelSpec
from muxtune.support.errors import SpecError
from muxtune.support.printable import one_line, printable
from muxtune.support.tables import format_table, show_bytes

_MILLION, _BILLION = 10**6, 10**9


class ModelSummary(ModelSpec):
    """A preset, with its size."""

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorators above property
    @property
    def parameters(self) -> int:
        """Parameters of the whole model; tied embeddings count once."""
        return super().parameters


class ModelList(BaseModel):
    """What ``muxtune models --json`` prints."""

    models: list[ModelSummary]


class ClusterList(BaseModel):
    """What ``muxtune clusters --json`` prints."""

    clusters: list[ClusterSpec]


class PolicyOption(BaseModel):
    """An option of a policy's own, for ``--policy-option name=value``."""

    name: str
    type: str
    default: str | None
    """None where it must be given."""
    description: str


class PolicySummary(BaseModel):
    """One policy."""

    name: str
    summary: str
    options: list[PolicyOption] = []


class PolicyFault(BaseModel):
    """A policy of another package that cannot be used."""

    name: str
    reason: str


class PolicyList(BaseModel):
    """What ``muxtune policies --json`` prints."""

    policies: list[PolicySummary]
    faults: list[PolicyFault]


def models(wide: WideFlag = False, as_json: JsonFlag = False) -> None:
    """List the preset backbones; a Hugging Face directory (Llama, GPT-2, OPT) works as well."""
    specs = list(PRESETS.values())
    rows = [
        [
            m.name,
            m.family,
            str(m.layers),
            f"{m.hidden:,}",
            f"{m.heads} / {m.kv_heads}",
            f"{m.ffn:,}",
            f"{m.vocab:,}",
            f"{m.max_positions:,}",
            _show_parameters(m.parameters),
            m.dtype,
        ]
        for m in specs
    ]
    header = "model,family,layers,hidden,heads / kv,ffn,vocab,positions,parameters,dtype".split(",")
    summaries = [ModelSummary(**m.model_dump()) for m in specs]
    emit(ModelList(models=summaries), format_table(header, rows), wide=wide, as_json=as_json)


def _show_parameters(parameters: int) -> str:
    """``6.74 B`` or ``5.94 M``."""
    billions = parameters >= _BILLION
    return f"{parameters / _BILLION:.2f} B" if billions else f"{parameters / _MILLION:.2f} M"


clusters_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@clusters_app.callback()
def clusters(context: typer.Context, wide: WideFlag = False, as_json: JsonFlag = False) -> None:
    """List the preset clusters; a YAML file works as well."""
    if context.invoked_subcommand is not None:
        if wide or as_json:
            context.fail(f"The options of clusters do not go with {context.invoked_subcommand}.")
        return
    specs = [load_cluster(name) for name in cluster_names()]
    rows = [
        [
            c.name,
            c.device.name,
            str(c.nodes),
            str(c.devices_per_node),
            show_bytes(c.device.memory_bytes),
            show_bytes(c.device.reserved_bytes),
            c.links,
        ]
        for c in specs
    ]
    header = ["cluster", "device", "nodes", "per node", "memory per rank", "reserved", "links"]
    table = format_table(header, rows)
    emit(ClusterList(clusters=specs), table, wide=wide, as_json=as_json)


@clusters_app.command("show")
def show_cluster(
    name: Annotated[str, typer.Argument(help="A preset or a YAML file.", show_default=False)],
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="As a file that --cluster takes, to change what differs.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show one cluster with all its fields."""
    if as_yaml and as_json:
        raise SpecError("--yaml", True, "one of --yaml and --json")
    spec = load_cluster(name)
    # YAML for people, too: what a file says, and no field that has its default.
    content = spec.model_dump(mode="json", exclude_defaults=True)
    emit(spec, yaml.safe_dump(content, sort_keys=False).rstrip(), as_json=as_json)


def policies(wide: WideFlag = False, as_json: JsonFlag = False) -> None:
    """List the policies, those of installed packages included."""
    from muxtune.policies import POLICIES, choose_policy
    from muxtune.support.registry import PluginError

    found: list[PolicySummary] = []
    faults = [PolicyFault(name=fault.name, reason=fault.reason) for fault in POLICIES.faults()]
    for name in POLICIES.names():
        chosen = choose_policy(name)
        try:
            options = _policy_options(chosen.options_model)
        except PluginError as error:
            faults.append(PolicyFault(name=name, reason=str(error)))
        else:
            found.append(PolicySummary(name=name, summary=chosen.policy.summary, options=options))
    lines = []
    for policy in found:
        lines.append((policy.name, policy.summary))
        lines += [("", _shown(option)) for option in policy.options]
    lines += [(fault.name, f"cannot be used: {fault.reason}") for fault in faults]
    width = max(len(name) for name, _ in lines)
    text = "\n".join(f"{printable(name).ljust(width)}  {one_line(what)}" for name, what in lines)
    emit(PolicyList(policies=found, faults=faults), text, wide=wide, as_json=as_json)


def _policy_options(model: type[BaseModel] | None) -> list[PolicyOption]:
    if model is None:
        return []
    return [
        PolicyOption(
            name=name,
            type=_type_name(field.annotation),
            default=None if field.is_required() else str(field.get_default(call_default_factory=True)),
            description=field.description or "",
        )
        for name, field in model.model_fields.items()
    ]


def _type_name(annotation: object) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _shown(option: PolicyOption) -> str:
    default = "required" if option.default is None else f"default {option.default}"
    described = f": {option.description}" if option.description else ""
    return f"  --policy-option {option.name}=... ({option.type}, {default}){described}"
