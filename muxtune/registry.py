"""A registry that is open to other packages and strict about names."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from muxtune.errors import MuxTuneError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Named objects of one kind: our own by decorator, those of other packages by entry point.

    Args:
        kind: What is registered, for messages.
        group: Entry-point group through which installed packages add theirs.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._entries: dict[str, T] = {}
        self._plugins_loaded = False

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator: register one instance of the class under ``name``.

        Raises:
            MuxTuneError: The name is taken; a duplicate is a bug.
        """

        def decorate(cls: type) -> type:
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
            UserError: There is none; the message proposes the nearest.
        """
        self._load_plugins()
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load_plugins()
        return sorted(self._entries)

    def _load_plugins(self) -> None:
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        for point in entry_points(group=self.group):
            loaded = point.load()
            self.add(point.name, cast("T", loaded() if isinstance(loaded, type) else loaded))
