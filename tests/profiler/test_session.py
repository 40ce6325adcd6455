"""Whole sessions with real processes: a small real profile, refusals, failures, interruption."""

import os
import signal
import subprocess
import sys
import time

import pytest

import profiler.jobs
import profiler.session
from muxtune.costs import ProfiledCosts, load_profile, save_profile
from muxtune.costs.conditions import conditions_digest
from muxtune.costs.needs import PLAIN_KINDS
from muxtune.graph.operators import COLLECTIVE_KINDS, FWD_ONLY, LINK_KINDS, Operator
from muxtune.model import PRESETS
from muxtune.support.errors import RunError, SpecError, UserError
from muxtune.support.processes import Stopped
from profiler import profile_model
from profiler.jobs import plan_job
from profiler.journal import journal_path, open_journal
from profiler.timing import Sample
from profiler.worker_protocol import Reading, write_line
from tests.kinds import KINDS_WITHOUT_BIASES, MEASURED_KINDS
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators, stage_s

SMALL = PRESETS["llama-tiny"].model_copy(
    update={
        "name": "llama-mini",
        "layers": 2,
        "hidden": 64,
        "ffn": 128,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "max_positions": 128,
    }
)


def test_unknown_devices_are_refused():
    with pytest.raises(UserError, match="no device named 'tpu'; did you mean 'cpu'"):
        profile_model(SMALL, device="tpu")


def test_an_absent_gpu_is_refused():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(UserError, match="expected a CUDA device"):
        profile_model(SMALL, device="cuda")


@pytest.mark.parametrize("ranks", [0, -1, 65])
def test_a_senseless_number_of_ranks_is_refused(ranks):
    with pytest.raises(SpecError, match=f"ranks = {ranks}: expected 1 to 64"):
        profile_model(SMALL, ranks=ranks)


def test_a_place_that_cannot_be_written_is_refused_before_measuring(tmp_path):
    with pytest.raises(UserError, match="expected a file, not a directory"):
        profile_model(SMALL, out=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the profile"):
        profile_model(SMALL, out=tmp_path / "file" / "p.parquet")


TINY_GRID = [
    *(Operator("norm", (16,)), Operator("linear", (64, 128, 16)), Operator("feed", (2,))),
    *(Operator("p2p", (4096,)), Operator("message", (4096,))),
    *(Operator(kind, (4096, 2)) for kind in sorted(COLLECTIVE_KINDS)),
]


@pytest.mark.integration
def test_a_session_of_two_ranks_measures_collectives_too(monkeypatch, tmp_path):
    asked = []

    def tiny_grid(model, *, quick, kinds, group_sizes):
        asked.append(group_sizes)
        return TINY_GRID

    monkeypatch.setattr(profiler.jobs, "operator_grid", tiny_grid)
    profile = profile_model(SMALL, out=tmp_path / "p.parquet", ranks=2, quick=True)
    assert asked == [[2]]
    assert load_profile(tmp_path / "p.parquet") == profile
    expected = {(op, "fwd") for op in TINY_GRID}
    expected |= {(op, "bwd") for op in TINY_GRID if op.kind not in FWD_ONLY}
    assert {(m.op, m.phase) for m in profile.measurements} == expected
    costs = ProfiledCosts(profile, SMALL)
    for kind in COLLECTIVE_KINDS:
        (m,) = profile.of_kind(kind)
        assert costs.latency_s(m.op, "fwd") == pytest.approx(m.median_s)
        assert costs.latency_s(Operator(kind, (4096, 1)), "fwd") == 0.0
    assert profile.overlaps.ranks == 2
    assert [each.tokens for each in profile.overlaps.rounds] == [64, 256, 1024]
    assert costs.contention == profile.overlaps.contention >= 0
    provenance = profile.provenance
    assert provenance.backend == "gloo"
    assert {"torch", "python"} < set(provenance.versions)
    assert provenance.settings["threads"] == "1"
    assert [(c.rank, c.moment) for c in provenance.clocks] == [
        (rank, moment) for rank in range(2) for moment in ("before", "after")
    ]


@pytest.mark.parametrize(
    ("device", "ranks", "available", "communicating"),
    [
        *(("cpu", 1, 1, 2), ("cpu", 2, 2, 2), ("cpu", 4, 2, 4)),
        # A GPU is not shared between ranks that communicate.
        *(("cuda", 1, 1, 0), ("cuda", 2, 1, 0), ("cuda", 1, 8, 2), ("cuda", 4, 8, 4), ("cuda", 8, 4, 4)),
    ],
)
def test_so_many_ranks_communicate(device, ranks, available, communicating):
    link_ranks = profiler.session._link_ranks(device, ranks, available)
    assert link_ranks == communicating
    job = plan_job(SMALL, device, ranks, kinds=set(MEASURED_KINDS), link_ranks=link_ranks, quick=True)
    assert job.processes == max(ranks, communicating)
    assert bool(job.overlaps) == (ranks > 1 and communicating > 0)
    assert {kind for kind, _ in job.operators} == set(MEASURED_KINDS) - LINK_KINDS - KINDS_WITHOUT_BIASES
    kinds = {kind for kind, _ in job.links}
    assert kinds == ({"p2p"} | COLLECTIVE_KINDS if communicating else set())
    sizes = {dims[1] for kind, dims in job.links if kind in COLLECTIVE_KINDS}
    assert sizes == {n for n in (2, 4, 8) if n <= communicating}


@pytest.mark.slow
@pytest.mark.integration
def test_a_real_profile_prices_its_own_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(profiler.jobs, "_QUICK_LIMIT_S", 0.03)  # hundreds of repetitions of such operators
    out = tmp_path / "new" / "p.parquet"
    profile = profile_model(SMALL, out=out, ranks=1, quick=True, kinds=set(MEASURED_KINDS))
    assert load_profile(out) == profile
    assert [path.name for path in out.parent.iterdir()] == ["p.parquet"]
    assert {m.op.kind for m in profile.measurements} == set(MEASURED_KINDS) - KINDS_WITHOUT_BIASES
    for m in profile.measurements:
        assert 1e-7 < m.p10_s <= m.median_s <= m.p90_s
        assert m.repetitions >= 5
    assert (profile.provenance.ranks, profile.provenance.threads) == (1, 1)
    costs = ProfiledCosts(profile, SMALL)
    # Wide: a machine that does other things at the same time; that the pieces fit together is the point.
    for stage in costs.stages:
        assert stage_s(costs.overhead(stage.phase), stage) == pytest.approx(stage.measured_s, rel=0.6)


@pytest.mark.integration
def test_a_failing_process_is_reported_with_its_last_words(monkeypatch, tmp_path):
    monkeypatch.setattr(profiler.jobs, "operator_grid", lambda *_, **__: TINY_GRID)
    monkeypatch.setattr(profiler.jobs, "SUITE", "toch")
    with pytest.raises(RunError, match=r"on rank ([01]): \[rank\1\]: .*no operator suite named 'toch'"):
        profile_model(SMALL, out=tmp_path / "p.parquet", ranks=1, quick=True)
    assert not (tmp_path / "p.parquet").exists()


_INTERRUPTED = """
import signal, sys
from pathlib import Path
from muxtune.model import PRESETS
from profiler import profile_model
from profiler.jobs import plan_job
from profiler.journal import journal_path, open_journal
from profiler.timing import Sample
from profiler.worker_protocol import Reading, write_line
# A shell's background jobs inherit that it is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
profile_model(PRESETS["llama-tiny"], out=Path(sys.argv[1]), ranks=2)
"""


def _workers_of(folder):
    """Measuring processes whose temporary directory lies in ``folder``."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    command = file.read().decode(errors="replace").split("\0")
            except OSError:
                continue  # ended meanwhile
            if "profiler.worker" in command and any(part.startswith(str(folder)) for part in command):
                found.append(int(entry))
    return found


def _until(condition, deadline_s):
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


@pytest.mark.integration
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc to find the processes")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interruption_leaves_no_process_and_what_was_measured(tmp_path, how):
    out, temporary = tmp_path / "out" / "p.parquet", tmp_path / "tmp"
    temporary.mkdir()
    session = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED, str(out)],
        env=os.environ | {"TMPDIR": str(temporary)},
        stderr=subprocess.DEVNULL,
    )
    journal = journal_path(out)
    try:
        _until(lambda: journal.exists() and journal.read_text().count("reading") > 3, 120)
        assert len(_workers_of(temporary)) == 2
        session.send_signal(how)
        session.wait(30)
        _until(lambda: not _workers_of(temporary), 60)
    finally:
        session.kill()
        session.wait()
    assert not out.exists()
    if how == signal.SIGINT:
        assert list(temporary.iterdir()) == []
    with open_journal(out, conditions_digest(PRESETS["llama-tiny"], 2) + " cpu full") as opened:
        assert sum(isinstance(line, Reading) for line in opened.lines) > 3


@pytest.mark.integration
def test_a_stopped_session_goes_on_and_a_profile_grows(monkeypatch, tmp_path):
    """Stopped in the middle, continued, added to: everything is measured once, and prices stay."""
    grid = {
        "plain": [op for op in TINY_GRID if op.kind not in COLLECTIVE_KINDS],
        "ia3": [Operator("ia3", (64, 64, 16))],
    }
    monkeypatch.setattr(
        profiler.jobs,
        "operator_grid",
        lambda model, *, kinds, **_: [op for ops in grid.values() for op in ops if op.kind in kinds],
    )
    asked = []
    whole = profiler.session.measured_lines

    def lines(job, *, stop_after=None):
        asked.append({kind for kind, _ in job.operators} | {kind for kind, _ in job.links})
        for number, text in enumerate(whole(job)):
            yield text
            if stop_after is not None and "reading" in text and '"norm"' in text and number:
                raise KeyboardInterrupt

    out = tmp_path / "p.parquet"
    monkeypatch.setattr(profiler.session, "measured_lines", lambda job: lines(job, stop_after="norm"))
    with pytest.raises(KeyboardInterrupt):
        profile_model(SMALL, out=out, ranks=1, quick=True)
    assert not out.exists()
    assert journal_path(out).exists()
    monkeypatch.setattr(profiler.session, "measured_lines", lines)
    plain = profile_model(SMALL, out=out, ranks=1, quick=True)
    assert not journal_path(out).exists()
    assert asked[0] == {"norm", "linear", "feed", "p2p"}
    assert asked[1] < asked[0]
    assert "p2p" not in asked[1]
    assert plain.kinds == {op.kind for op in grid["plain"]}

    assert profile_model(SMALL, out=out, ranks=1, quick=True) == plain
    assert len(asked) == 2
    grown = profile_model(SMALL, out=out, ranks=1, quick=True, kinds=PLAIN_KINDS | {"ia3"})
    assert asked[2] == {"ia3"}
    assert load_profile(out) == grown
    assert grown.profile_id == plain.profile_id
    assert grown.digest != plain.digest
    assert grown.of_kinds(PLAIN_KINDS) == plain
    (addition,) = grown.provenance.additions
    assert addition.kinds == ("ia3",)
    assert [clock.moment for clock in addition.clocks] == ["before", "after"]


@pytest.mark.parametrize("readings", [0, 1])
def test_whoever_stops_it_is_told_what_is_kept(monkeypatch, tmp_path, readings):
    out = tmp_path / "p.parquet"

    def lines(job):
        reading = Reading(Operator("norm", (16,)), "fwd", Sample(1e-3, 1e-3, 1e-3, 5))
        yield from [write_line(reading)] * readings
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(profiler.session, "measured_lines", lines)
    with pytest.raises(Stopped) as stopped:
        profile_model(SMALL, out=out, ranks=1)
    said = f"what is measured so far is kept in {out}.partial; the same command goes on from there"
    assert stopped.value.kept == (said if readings else "nothing is measured yet")
    assert not out.exists()
    assert journal_path(out).exists() == bool(readings)


def test_a_profile_of_other_conditions_is_neither_added_to_nor_replaced(tmp_path):
    out = tmp_path / "p.parquet"
    save_profile(make_profile(analytic_law(), operators()), out)
    before = out.read_bytes()
    for model, options, said in (
        (PRESETS["gpt2-tiny"], {"ranks": 2}, "family llama, here gpt2"),
        (PRESETS["llama-tiny"], {"ranks": 1}, "ranks 2, here 1"),
    ):
        with pytest.raises(SpecError, match=f"expected another file, or --fresh .*{said}"):
            profile_model(model, out=out, **options)
    out.write_text("no profile")
    with pytest.raises(UserError, match="not a whole Parquet file"):
        profile_model(PRESETS["llama-tiny"], out=out)
    out.write_bytes(before)


def test_a_backbone_whose_layers_do_not_fit_a_rank_is_refused_before_measuring(tmp_path):
    huge = PRESETS["opt-30b"].model_copy(update={"hidden": 1 << 20, "ffn": 1 << 22})
    with pytest.raises(
        SpecError, match=r"model = 'opt-30b': expected one of which 4 layers fit a rank: they"
    ):
        profile_model(huge, out=tmp_path / "p.parquet")
    assert list(tmp_path.iterdir()) == []
