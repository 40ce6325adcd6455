"""``profile``: measure operators."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import BaseModel

from muxtune.cli.options import JsonFlag
from muxtune.cli.output import check_writable, emit, stdout_kept_clean
from muxtune.costs.profile import Profile, Provenance
from muxtune.model import Dtype, load_model_spec
from muxtune.tables import format_table, show_percent, show_seconds


class ProfileSummary(BaseModel):
    """What ``muxtune profile --json`` prints."""

    out: Path
    profile_id: str
    digest: str
    measurements: dict[str, int]
    """Per operator kind."""
    provenance: Provenance


def profile(
    model: Annotated[str, typer.Option("--model", help="Preset or Hugging Face directory.")],
    out: Annotated[Path, typer.Option("--out", help="Parquet file to write.")],
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device to measure.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations.")] = "float32",
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes that measure at the same time; 2 by default.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A coarser grid, in a fraction of the time.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure what the backbone's operators cost on this machine."""
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
        provenance=measured.provenance,
    )
    emit(summary, f"{measured.profile_id} in {out}\n\n{_table(measured, kinds)}", as_json=as_json)


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
