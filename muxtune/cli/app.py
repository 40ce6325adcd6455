"""The ``muxtune`` command: its commands, and what becomes of errors.

Exit code 0 on success, 2 for a mistake of the user (one line that says what and where), 1 for our own
failure, 130 after Ctrl-C and 143 after SIGTERM (one line that says what is kept). ``MUXTUNE_DEBUG=1`` shows
the traceback of a failure.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from muxtune.cli import catalog, compare, costs_commands, demo, planning, profile, running, status, sweep
from muxtune.cli.output import discard_stdout, show, whole_stdout
from muxtune.support.errors import MuxTuneError, UserError
from muxtune.support.printable import one_line
from muxtune.support.processes import (
    Stopped,
    end_process,
    keep_current_directory_out,
    stoppable,
    under_torchrun,
)

app = typer.Typer(
    name="muxtune",
    help="Multiplex many PEFT jobs on one frozen backbone: profile, plan, simulate, run, validate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: pipes and logs read it too
)

app.command()(demo.demo)
app.add_typer(profile.profile_app, name="profile")
app.add_typer(costs_commands.costs_app, name="costs", help="What operators cost, and how well it is known.")
app.add_typer(planning.plan_app, name="plan")
app.command()(planning.simulate)
app.command()(running.run)
app.command()(running.validate)
app.command()(status.status)
app.command()(compare.compare)
app.command()(sweep.sweep)
app.command()(catalog.models)
app.add_typer(catalog.clusters_app, name="clusters")
app.command()(catalog.policies)


def _print_version(wanted: bool) -> None:
    if wanted:
        show(f"muxtune {version('muxtune')}")
        raise typer.Exit


@app.callback()
def _configure(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    warnings.showwarning = _show_warning
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("muxtune: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


class _OneLine(logging.Formatter):
    """What libraries and we log, without the control characters of users' files."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """One line without the source that raised it, which says nothing to a user."""
    sys.stderr.write(f"muxtune: warning: {one_line(str(message))}\n")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit code.

    Args:
        arguments: Command line without the program's name; that of the process by default.
    """
    keep_current_directory_out()
    try:
        # One of torchrun's ranks waits in libraries that let no signal through; `run` has its own way there.
        with nullcontext() if under_torchrun() else stoppable(), whole_stdout():
            app(args=arguments, prog_name="muxtune")
    except Stopped as stopped:
        said = stopped if stopped.kept else f"{stopped}: nothing was written"
        sys.stderr.write(f"muxtune: {one_line(str(said))}\n")
        discard_stdout()  # of a result, no half
        sys.exit(stopped.exit_code)
    except UserError as error:
        _end(error, code=2)
    except Exception as error:  # the outermost door: whatever escapes is a failure of ours
        if os.environ.get("MUXTUNE_DEBUG") == "1":
            raise
        _end(error, code=1)
    sys.exit(0)


def _end(error: Exception, *, code: int) -> NoReturn:
    message = one_line(str(error))
    if not isinstance(error, MuxTuneError):
        message = f"{type(error).__name__}: {message} (MUXTUNE_DEBUG=1 shows where)"
    sys.stderr.write(f"muxtune: error: {message}\n")
    if under_torchrun():
        end_process(code)  # the interpreter's own finish may wait for ranks that do not come
    sys.exit(code)
