"""``profile``: measure operators, or import measurements of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import BaseModel

from muxtune.cli.options import JsonFlag
from muxtune.cli.output import check_writable, emit
from muxtune.costs.measurements import MeasurementsProvenance
from muxtune.costs.profile import Profile, Provenance
from muxtune.graph.attention_backends import DEFAULT_ATTENTION, AttentionContest
from muxtune.model import Dtype, load_model_spec
from muxtune.support.clean_stdout import stdout_kept_clean
from muxtune.support.tables import format_table, show_percent, show_seconds

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
def profile(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Preset or Hugging Face directory.  [required]", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Parquet file to write.  [required]", show_default=False)
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device to measure.")] = "cpu",
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
    quick: Annotated[
        bool, typer.Option("--quick", help="A coarser grid, in a fraction of the time.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure what the backbone's operators cost on this machine."""
    if context.invoked_subcommand is not None:
        # A group cannot demand its options only when it runs alone, so it looks for itself which case it is.
        own = (model, out, device, dtype, ranks, quick, as_json)
        if own != (None, None, "cpu", None, None, False, False):
            context.fail(f"The options of profile do not go with {context.invoked_subcommand}.")
        return
    if model is None:
        context.fail("Missing option '--model'.")
    if out is None:
        context.fail("Missing option '--out'.")
    check_writable(out, "--out")
    spec = load_model_spec(model, dtype)
    from profiler import profile_model

    with stdout_kept_clean():
        measured = profile_model(spec, device=device, out=out, ranks=ranks, quick=quick, progress=True)
    kinds = sorted({m.op.kind for m in measured.measurements})
    summary = ProfileSummary(
        out=out,
        profile_id=measured.profile_id,
        digest=measured.digest,
        measurements={kind: sum(1 for _ in measured.of_kind(kind)) for kind in kinds},
        contention=None if measured.overlaps is None else measured.overlaps.contention,
        provenance=measured.provenance,
    )
    text = f"{measured.profile_id} in {out}\n\n{_table(measured, kinds)}"
    if measured.provenance.attention is not None:
        text += f"\n\n{_contest(measured.provenance.attention)}"
    if summary.contention is not None:
        text += f"\n\ncomputing beside an all-reduce: each at rate 1 / (1 + {summary.contention:.2f})"
    emit(summary, text, as_json=as_json)


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
    emit(ImportSummary(out=out, provenance=provenance), "\n".join(lines), as_json=as_json)


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
