"""The pages that describe the project, and what they name: links, paths, modules, commands, examples."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

WRITTEN = ("docs/gpu-report.md",)
"""Pages that a command writes."""

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """A page in Markdown."""

    name: str
    """Path from the root."""
    text: str

    @cached_property
    def prose(self) -> str:
        """The page without its fenced blocks."""
        return _FENCE.sub("", self.text)

    @cached_property
    def spans(self) -> list[str]:
        """What stands between backticks in the prose; an escaped bar of a table is a bar."""
        found = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self.prose))
        return [span.replace(r"\|", "|") for span in found]

    @cached_property
    def commands(self) -> list[list[str]]:
        """Words of all commands, from blocks of shell, indented lines and spans."""
        blocks = [block for language, block in _FENCE.findall(self.text) if language == "sh"]
        lines = [line for block in blocks for line in block.splitlines()]
        # An indented line may go on with what the command does.
        lines += re.findall(r"^    ((?:muxtune|make|python) .*?)(?:  .*)?$", self.prose, re.MULTILINE)
        spans = [span for span in self.spans if span.startswith(("muxtune ", "make ", "python "))]
        return [shlex.split(line, comments=True) for line in lines] + [span.split() for span in spans]

    def commands_of(self, program: str) -> list[list[str]]:
        """Words behind the program's name."""
        return [words[words.index(program) + 1 :] for words in self.commands if program in words]

    @cached_property
    def links(self) -> list[str]:
        """Targets of relative links, with their anchors."""
        return [link for link in re.findall(r"\]\(([^)\s]+)\)", self.prose) if "://" not in link]

    @cached_property
    def anchors(self) -> set[str]:
        """Anchors of the page's headings, as GitHub makes them."""
        kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(self.prose))
        return {heading.replace(" ", "-") for heading in kept}

    @cached_property
    def paths(self) -> set[str]:
        """What looks like a path: words with a slash in spans and commands, and modules in pictures."""
        words = {word for line in [*self.commands, *map(str.split, self.spans)] for word in line}
        found = {word.removeprefix("ARGS=") for word in words}
        found = {word.rstrip("/") for word in found if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?|[a-z]\w+/", word)}
        return found | set(re.findall(r"(?<=>)[\w.-]+(?:/[\w.-]+)+\.py\b", self.text))

    @cached_property
    def words(self) -> int:
        """Words of the whole page; bars and dashes of tables are none."""
        return sum(bool(re.search(r"\w", word)) for word in self.text.split())

    def example(self, name: str) -> str:
        """The block behind the comment ``<!-- example: name -->``."""
        (text,) = re.findall(
            rf"^<!-- example: {re.escape(name)} -->\n```\w+\n(.*?)^```$", self.text, re.M | re.S
        )
        return text


def load_page(name: str) -> Page:
    """A page by its path from the root."""
    return Page(name, (ROOT / name).read_text())


def load_pages() -> list[Page]:
    """README.md, CONTRIBUTING.md and all of docs."""
    names = [f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))]
    return [load_page(name) for name in ("README.md", "CONTRIBUTING.md", *names) if name not in WRITTEN]
