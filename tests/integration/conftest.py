"""What the comparisons with solo runs share: ranks that start at once, and a bench of solo runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from muxtune.cli.app import main
from muxtune.support.tables import format_table
from tests.integration.parity import ParityBench
from tests.integration.parity_tasks import TASKS
from tests.integration.prepared import prepared_ranks
from tests.muxtune.cli.conftest import Result


@pytest.fixture
def quick_ranks() -> Iterator[None]:
    """``run_plan`` forks its ranks from a process that has imported everything."""
    with prepared_ranks():
        yield


@pytest.fixture
def command(capsys, quick_ranks, monkeypatch) -> Callable[..., Result]:
    """Runs a command line in this process; exit code and both streams. Its ranks are forked as above."""
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # the command sets it for its children; afterwards as it was

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return Result(ended.value.code, streams.out, streams.err)

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On tensors this small, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def solo_bench(tmp_path_factory) -> ParityBench:
    return ParityBench(tmp_path_factory.mktemp("parity"), TASKS)


@pytest.fixture
def bench(solo_bench, quick_ranks, one_thread) -> ParityBench:
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
