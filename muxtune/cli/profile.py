"""``profile``: measure operators, or import measurements of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import BaseModel

from muxtune.api.costs import DEFAULT_RANKS
from muxtune.cli.options import JsonFlag, WideFlag, was_given
from muxtune.cli.output import check_writable, emit
from muxtune.costs.kept import kept_profile_path
from muxtune.costs.measurements import MeasurementsProvenance
from muxtune.costs.needs import method_kinds, needed_kinds
from muxtune.costs.profile import Profile, Provenance, load_provenance
from muxtune.graph.attention_backends import DEFAULT_ATTENTION, AttentionContest
from muxtune.model import Dtype, ModelSpec, load_model_spec
from muxtune.peft import METHODS
from muxtune.support.clean_stdout import stdout_kept_clean
from muxtune.support.errors import SpecError
from muxtune.support.tables import format_table, show_percent, show_seconds
from muxtune.tasks import Workload, load_workload

profile_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
_import_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
profile_app.add_typer(_import_app, name="import", help="Read measurements that others published.")


class ProfileSummary(BaseModel):
    """What ``muxtune profile --json`` prints."""

    out: Path
    profile_id: str
    digest: str
    measurements: dict[str, int]
    """Measurements per operator kind."""
    contention: float | None
    """Computing beside a collective slows both to the rate ``1 / (1 + contention)``; null if not measured."""
    provenance: Provenance


class ImportSummary(BaseModel):
    """What ``muxtune profile import --json`` prints."""

    out: Path
    provenance: MeasurementsProvenance


@profile_app.callback()
def profile(  # noqa: PLR0913, PLR0917  # an argument per option
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Preset or Hugging Face directory; by default the workload's backbone, or that of the "
            "profile in --out.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Parquet file. By default that which `muxtune plan` looks for on this machine's CPU.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Device to measure; cpu by default.")
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Of weights and activations; a preset's own by default; float32 for a directory.",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes that measure at the same time; 2 by default.")
    ] = None,
    workload: Annotated[
        Path | None,
        typer.Option(
            "--workload", help="Measure what the tasks of this workload file need.", show_default=False
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="Measure what these PEFT methods need, with commas between them, or `all`; what "
            "every profile has is always among them.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A coarser grid, in a fraction of the time.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure everything anew, and replace what --out has.")
    ] = False,
    wide: WideFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure what the backbone's operators cost on this machine; what a profile has is not measured again.

    A profile that is there is added to. A measurement that is stopped goes on with the same command.
    """
    if context.invoked_subcommand is not None:
        # A group cannot demand its options only when it runs alone, so it looks for itself which case it is.
        if any(was_given(context, name) for name in context.params):
            context.fail(f"The options of profile do not go with {context.invoked_subcommand}.")
        return
    check_writable(out, "--out", inputs=[workload])
    kinds = method_kinds(_method_names(methods))  # a wrong name is refused before anything is loaded
    tasks = None if workload is None else load_workload(workload)
    former = load_provenance(out) if out is not None and out.is_file() and not fresh else None
    spec = _backbone(model, dtype, tasks, former)
    if spec is None:
        context.fail("Missing option '--model' (or '--workload', or an '--out' that has a profile).")
    if tasks is not None:
        tasks.check(spec)
        kinds |= needed_kinds((task.peft for task in tasks.tasks), spec)
    if former is not None:
        device, ranks = device or ("cuda" if former.device == "cuda" else "cpu"), ranks or former.ranks
    if out is None:
        if device == "cuda" or quick:
            raise SpecError(
                "--out",
                None,
                f"a file: what {'a GPU' if device == 'cuda' else '--quick'} "
                "gives is not kept for `muxtune plan`",
            )
        ranks = ranks or DEFAULT_RANKS
        out = kept_profile_path(spec, ranks)
    from profiler import profile_model

    with stdout_kept_clean():
        measured = profile_model(
            spec,
            device=device or "cpu",
            out=out,
            ranks=ranks,
            quick=quick,
            kinds=kinds,
            fresh=fresh,
            progress=True,
        )
    names = sorted(measured.kinds)
    summary = ProfileSummary(
        out=out,
        profile_id=measured.profile_id,
        digest=measured.digest,
        measurements={kind: sum(1 for _ in measured.of_kind(kind)) for kind in names},
        contention=None if measured.overlaps is None else measured.overlaps.contention,
        provenance=measured.provenance,
    )
    text = f"{measured.profile_id} in {out}\n\n{_table(measured, names)}"
    if measured.provenance.attention is not None:
        text += f"\n\n{_contest(measured.provenance.attention)}"
    if summary.contention is not None:
        text += f"\n\ncomputing beside an all-reduce: each at rate 1 / (1 + {summary.contention:.2f})"
    emit(summary, text, wide=wide, as_json=as_json)


def _method_names(text: str | None) -> list[str]:
    if text is None:
        return []
    return list(METHODS.names()) if text.strip() == "all" else [name.strip() for name in text.split(",")]


def _backbone(
    model: str | None, dtype: Dtype | None, workload: Workload | None, former: Provenance | None
) -> ModelSpec | None:
    """The backbone that is named, or that of the workload, or of the profile that is there."""
    if model is None and workload is not None:
        model, dtype = workload.backbone, dtype or workload.dtype
    if model is not None:
        return load_model_spec(model, dtype)
    return None if former is None or dtype is not None else former.model


@_import_app.command()
def vidur(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Vidur's data/profiling, or below it compute, network, or the folder of a device, model or "
            "topology.",
            show_default=False,
        ),
    ],
    device: Annotated[str, typer.Option("--device", help="Whose measurements: a40, a100, h100, ...")],
    out: Annotated[Path, typer.Option("--out", help="Parquet file to write.")],
    wide: WideFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Read the CSV files that the Vidur simulator publishes (github.com/microsoft/vidur)."""
    check_writable(out, "--out")
    from profiler.vidur import import_vidur

    provenance = import_vidur(folder, device, out)
    files = "1 file" if provenance.files == 1 else f"{provenance.files} files"
    lines = [f"{out}: measurements of {provenance.device} from {files}"]
    lines += [f"  {name}: {rows:,} shapes" for name, rows in provenance.rows.items()]
    if provenance.merged:
        lines.append(f"  {provenance.merged:,} repeated measurements merged into medians")
    if provenance.below_resolution:
        lines.append(f"  {provenance.below_resolution:,} measurements of 0 ms left out")
    emit(ImportSummary(out=out, provenance=provenance), "\n".join(lines), wide=wide, as_json=as_json)


def _contest(contest: AttentionContest) -> str:
    ratios = ((each.backend, contest.ratio(each.backend)) for each in contest.times)
    tried = ", ".join(f"{backend} {ratio:.2f}x" for backend, ratio in ratios if ratio is not None)
    return f"attention by {contest.chosen} (times relative to {DEFAULT_ATTENTION}: {tried})"


def _table(profile: Profile, kinds: list[str]) -> str:
    rows = []
    for kind in kinds:
        measurements = list(profile.of_kind(kind))
        medians_s = [m.median_s for m in measurements]
        spreads = sorted((m.p90_s - m.p10_s) / m.median_s for m in measurements)
        rows.append(
            [
                kind,
                str(len(measurements)),
                show_seconds(min(medians_s)),
                show_seconds(max(medians_s)),
                show_percent(spreads[len(spreads) // 2]),
            ]
        )
    return format_table(["operator", "points", "fastest", "slowest", "median spread (p10 to p90)"], rows)
