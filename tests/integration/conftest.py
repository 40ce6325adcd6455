"""What the comparisons with solo runs share: ranks that start at once, and a bench of solo runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any

import pytest

import profiler.session
from muxtune.costs import Profile, save_profile
from muxtune.support.tables import format_table
from profiler.jobs import Job
from tests.integration.parity import ParityBench
from tests.integration.parity_tasks import TASKS
from tests.integration.prepared import prepared_ranks
from tests.muxtune.cli.conftest import Result, call_main
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators


@pytest.fixture
def quick_ranks() -> Iterator[None]:
    """``run_plan`` forks its ranks from a process that has imported everything."""
    with prepared_ranks():
        yield


@pytest.fixture
def brief_measurements(monkeypatch) -> None:
    """Sessions measure the smaller half of each kind's shapes, and repeat no more than they must.

    For tests that ask how commands fit together, and not how good the costs are.
    """
    plan_job = profiler.session.plan_job

    def plan_brief_job(*arguments: Any, **options: Any) -> Job:
        job = plan_job(*arguments, **options)
        shapes: dict[str, list[tuple[int, ...]]] = {}
        for kind, dims in job.operators:
            shapes.setdefault(kind, []).append(dims)
        smaller = {
            (kind, dims)
            for kind, all_dims in shapes.items()
            for dims in sorted(all_dims, key=prod)[: (len(all_dims) + 1) // 2]
        }
        kept = tuple(each for each in job.operators if each in smaller)
        return job.model_copy(update={"operators": kept, "limit_s": 1e-3})

    monkeypatch.setattr(profiler.session, "plan_job", plan_brief_job)


@pytest.fixture
def made_up_profile(monkeypatch) -> Profile:
    """``profile_model`` takes its arguments, measures nothing, and returns and stores this profile."""
    profile = make_profile(analytic_law(), operators())
    accepted = inspect.signature(profiler.profile_model)

    def measure(*arguments: Any, **options: Any) -> Profile:
        out = accepted.bind(*arguments, **options).arguments.get("out")
        if out is not None:
            save_profile(profile, out)
        return profile

    monkeypatch.setattr("profiler.profile_model", measure)
    return profile


@pytest.fixture
def command(capsys, quick_ranks, monkeypatch) -> Callable[..., Result]:
    """Runs a command line in this process; exit code and both streams. Its ranks are forked as above."""
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # the command sets it for its children; afterwards as it was

    return partial(call_main, capsys)


@pytest.fixture(scope="session")
def solo_bench(tmp_path_factory) -> ParityBench:
    return ParityBench(tmp_path_factory.mktemp("parity"), TASKS)


@pytest.fixture
def bench(solo_bench, quick_ranks) -> ParityBench:
    """Runs of all modules on the tasks of ``parity_tasks``, compared with solo runs that are trained once."""
    return solo_bench


def pytest_terminal_summary(terminalreporter) -> None:
    """A table of the cases of ``make parity``."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    rows = [value for report in reports for name, value in report.user_properties if name == "parity"]
    if not rows:
        return
    header = ("case", "largest loss error", "largest adapter error", "of its limit")
    texts = [[case, f"{loss:.1e}", f"{update:.1e}", f"{share:.0%}"] for case, loss, update, share in rows]
    terminalreporter.section("parity")
    for line in format_table(header, sorted(texts)).splitlines():
        terminalreporter.line(line)
