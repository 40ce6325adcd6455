"""A registry that is open to other packages and strict about names."""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import EntryPoint, distributions, entry_points
from pathlib import Path
from typing import Generic, TypeVar, cast

from muxtune.support.errors import MuxTuneError, UserError, unknown_name
from muxtune.support.printable import SHOWN_CHARACTERS, one_line, short_repr

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Pattern of names that other packages register: they name files and columns, too."""

_OURS = "muxtune"
"""Package whose entry points come first."""


class PluginError(UserError):
    """What another package registered does not work; the message names it and says what it did."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that another package registers and that cannot be used."""

    name: str
    reason: str
    """Reason, with the package and its entry point."""


class Registry(Generic[T]):
    """Named objects of one kind: our own by decorator, those of other packages by entry point.

    An entry point is loaded when somebody asks for its name, or for all names. One that cannot be loaded is
    left out, and a warning says so: it spoils nothing but itself.

    Args:
        kind: What is registered, for messages.
        group: Entry-point group through which installed packages add theirs.
        methods: What an entry can be asked to do; one that lacks any is not used.
        summary: Whether an entry has a line ``summary`` that describes it.
    """

    def __init__(
        self, kind: str, group: str, *, methods: tuple[str, ...] = (), summary: bool = False
    ) -> None:
        self.kind = kind
        self.group = group
        self._methods = methods
        self._summary = summary
        self._entries: dict[str, T] = {}
        self._points: dict[str, list[EntryPoint]] | None = None
        self._origins: dict[str, str] = {}
        self._faults: dict[str, Fault] = {}

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator: register one instance of the class under ``name``.

        The same class defined again (a notebook's cell that runs twice) takes the place of the one before.

        Raises:
            MuxTuneError: Something else has the name; that is a bug.
        """

        def decorate(cls: type) -> type:
            known = type(self._entries.get(name))
            if (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__):
                del self._entries[name]
            self.add(name, cast("T", cls()))
            return cls

        return decorate

    def add(self, name: str, entry: T) -> None:
        """Register ``entry``; a duplicate name is a bug and raises ``MuxTuneError``."""
        if name in self._entries:
            raise MuxTuneError(f"the {self.kind} {name!r} is registered twice")
        self._entries[name] = entry

    def get(self, name: str) -> T:
        """The entry of that name.

        Raises:
            PluginError: Another package registers it, and it cannot be used.
            UserError: There is none; the message proposes the nearest.
        """
        if name not in self._entries:
            self._load(name)
        if name in self._entries:
            return self._entries[name]
        if name in self._faults:
            raise PluginError(self._faults[name].reason)
        raise unknown_name(self.kind, name, self.names())

    def names(self) -> list[str]:
        """All names that can be used, sorted."""
        self._load_all()
        return sorted(self._entries)

    def faults(self) -> list[Fault]:
        """What other packages register and cannot be used, sorted by name."""
        self._load_all()
        return sorted(self._faults.values(), key=lambda fault: fault.name)

    def origin(self, name: str) -> str | None:
        """Package and entry point of a name, for messages; None if no package registered it."""
        return self._origins.get(name)

    def _load_all(self) -> None:
        for name in list(self._found()):
            self._load(name)
            if name in self._faults:
                warnings.warn(f"{self._faults[name].reason}; it is left out", stacklevel=2)

    def _found(self) -> dict[str, list[EntryPoint]]:
        """Entry points by name; our own alone where others have the same name."""
        if self._points is None:
            self._points = {}
            for point in self._listed():
                self._points.setdefault(point.name, []).append(point)
            for name, points in self._points.items():
                self._points[name] = [point for point in points if _package(point)[0] == _OURS] or points
        return self._points

    def _listed(self) -> list[EntryPoint]:
        """Entry points of the group, without those of packages whose list cannot be read."""
        try:
            return list(entry_points(group=self.group))
        except Exception:  # one package's file spoils the list of all
            return [point for each in self._readable().values() for point in each]

    def _readable(self) -> dict[str, list[EntryPoint]]:
        """Entry points by package, of which the first on the path counts."""
        found: dict[str, list[EntryPoint]] = {}
        for distribution in distributions():
            name = distribution.name
            if name in found:
                continue
            try:
                found[name] = list(distribution.entry_points.select(group=self.group))
            except Exception as error:
                found[name] = []
                warnings.warn(f"entry_points.txt of {name} cannot be read: {raised(error)}", stacklevel=2)
        return found

    def _load(self, name: str) -> None:
        points = self._found().pop(name, [])
        if not points:
            return
        if len(points) > 1:
            both = " and ".join(_described(point) for point in points)
            self._leave_out(name, f"{both} both register it: expected one of them to be installed")
        elif name in self._entries:
            self._leave_out(name, f"{_described(points[0])}: {name!r} is registered twice")
        else:
            self._load_point(points[0])

    def _load_point(self, point: EntryPoint) -> None:
        described = _described(point)
        if not _NAME.fullmatch(point.name):
            self._leave_out(point.name, f"{described}: expected a name of letters, digits, '.', '_' and '-'")
            return
        try:
            with redirect_stdout(sys.stderr):  # a command's output is its own
                loaded = point.load()
                entry = loaded() if isinstance(loaded, type) else loaded
            wrong = self._wrong(entry)
        except (Exception, SystemExit) as error:  # it is not ours: whatever it does is its own fault alone
            wrong = f"loading it raised {raised(error)}"
        if wrong is not None:
            self._leave_out(point.name, f"{described}: {wrong}")
            return
        self._origins[point.name] = described
        self.add(point.name, cast("T", entry))

    def _wrong(self, entry: object) -> str | None:
        """What an entry lacks."""
        for method in self._methods:
            if not callable(getattr(entry, method, None)):
                return f"{type(entry).__name__} has no method {method}"
        summary = getattr(entry, "summary", None)
        if self._summary and not (isinstance(summary, str) and summary.strip()):
            return f"summary = {short_repr(summary)}: expected a line that describes the {self.kind}"
        return None

    def _leave_out(self, name: str, why: str) -> None:
        reason = f"the {self.kind} {short_repr(name)} of {one_line(why)}"
        self._faults[name] = Fault(name, reason)


def raised(error: BaseException) -> str:
    """An exception of somebody else's code in one line, with the place that raised it."""
    text = one_line(str(error))
    if len(text) > SHOWN_CHARACTERS:
        text = text[: SHOWN_CHARACTERS - 3] + "..."
    frames = traceback.extract_tb(error.__traceback__)
    place = ""
    if frames and not frames[-1].filename.startswith("<frozen") and frames[-1].filename != __file__:
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


def _package(point: EntryPoint) -> tuple[str, str]:
    """Name and version."""
    if point.dist is None:
        return "an unnamed package", ""
    return str(point.dist.name), str(point.dist.version)


def _described(point: EntryPoint) -> str:
    return f"{' '.join(_package(point)).strip()} (entry point {point.value})"
