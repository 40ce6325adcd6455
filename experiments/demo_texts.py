"""Texts of the demonstration: small supervised tasks with the length profiles of real datasets.

Made here, so that the demonstration downloads nothing. Every answer follows from its prompt, so a loss that
falls is learning and not memory of noise; answers are short and made of few characters, so it falls within
tens of steps. Lengths follow SST-2, OpenBookQA and RTE, the datasets of the paper: they decide how much is
lost to padding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from random import Random
from types import MappingProxyType

import numpy as np

from muxtune.data.histograms import load_length_histogram
from muxtune.support.errors import SpecError

__all__ = ["DEMO_DATASETS", "DemoDataset", "DemoExample", "write_demo_texts"]

# Candidates per example: with 48, lengths miss their target by half a byte or less; with one, by up to 8.
_TRIES = 48
_WORDS = (
    "acorn apple basil berry bread candle carrot cherry clove coffee cotton cream fern fig flour ginger "
    "glass grape honey iron juice kiwi lemon linen mango maple melon mint nut oat olive onion paper peach "
    "pear pepper plum rice salt silk soap sugar tea thyme tin wool"
).split()
# Not date.strftime, which speaks the language of the user's locale.
_MONTHS = "January February March April May June July August September October November December".split()
_WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_FIRST_DAY, _DAYS = date(1970, 1, 1), 60 * 365
_SUBJECTS = ("Bill", "Rent", "Parcel", "The invoice", "The contract", "The old lease", "A second letter")
_MODIFIERS = (
    "for us",
    "by mail",
    "in blue",
    "of the bank",
    "with a stamp",
    "from the depot",
    "for the new office",
    "about the north wing",
    "with all the signed copies",
)
_VERBS = ("due", "paid on", "sent on", "came on", "was signed on", "is to be delivered by")


@dataclass(frozen=True, slots=True)
class DemoExample:
    """One line of a dataset file."""

    prompt: str
    completion: str

    @property
    def tokens(self) -> int:
        """Length with one token per byte, BOS and EOS counted (the texts are ASCII)."""
        return 2 + len(self.prompt) + len(self.completion)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoDataset:
    """How one dataset file is made."""

    build: Callable[[Random, int], DemoExample]
    """A random example of roughly that many tokens."""
    lengths: str
    """Name of the length histogram that it follows."""
    max_tokens: int
    """Length that a user would declare (the paper's); no example is longer, so none is truncated."""


def write_demo_texts(folder: Path, *, examples_per_task: int = 320, seed: int = 0) -> dict[str, Path]:
    """Write one JSONL file of ``{"prompt", "completion"}`` lines per dataset of :data:`DEMO_DATASETS`.

    Args:
        folder: Folder to write to; made if it is missing. Files of the same name are replaced.
        examples_per_task: Lines per file.
        seed: Seed of the texts: equal seeds give equal bytes. A dataset does not depend on the others.

    Returns:
        The file of each dataset, in the order of :data:`DEMO_DATASETS`.

    Raises:
        SpecError: ``examples_per_task`` is below 1.
    """
    if examples_per_task < 1:
        raise SpecError("examples_per_task", examples_per_task, "at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, dataset in DEMO_DATASETS.items():
        rng = Random(f"{seed}/{name}")
        histogram = load_length_histogram(dataset.lengths)
        targets_tokens = histogram.sample(np.random.default_rng(rng.getrandbits(64)), examples_per_task)
        examples = [_build_near(dataset, rng, int(tokens)) for tokens in targets_tokens]
        lines = (json.dumps({"prompt": e.prompt, "completion": e.completion}) + "\n" for e in examples)
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(lines), encoding="utf-8", newline="\n")
    return paths


def _build_near(dataset: DemoDataset, rng: Random, target_tokens: int) -> DemoExample:
    """Example whose length comes closest to the target among a few candidates."""
    target_tokens = min(target_tokens, dataset.max_tokens)

    def badness(example: DemoExample) -> tuple[bool, int]:
        return example.tokens > dataset.max_tokens, abs(example.tokens - target_tokens)

    best = dataset.build(rng, target_tokens)
    for _ in range(_TRIES - 1):
        if best.tokens == target_tokens:
            break
        best = min(best, dataset.build(rng, target_tokens), key=badness)
    return best


def _add(rng: Random, tokens: int) -> DemoExample:
    """``12+30=`` -> ``42``."""
    terms = _terms(rng, tokens)
    return DemoExample("+".join(map(str, terms)) + "=", str(sum(terms)))


def _subtract(rng: Random, tokens: int) -> DemoExample:
    """``50-8-3=`` -> ``39``; never below zero."""
    rest, *taken = _terms(rng, tokens)
    return DemoExample("-".join(map(str, (rest + sum(taken), *taken))) + "=", str(rest))


def _terms(rng: Random, tokens: int) -> list[int]:
    # BOS, EOS and an answer of about 2 digits stand beside the terms; a term has 1 or 2 digits and its sign.
    n = max(2, round((tokens - 4) / rng.uniform(2, 3)))
    return [rng.randint(1, rng.choice((9, 29))) for _ in range(n)]


def _date_quarter(rng: Random, tokens: int) -> DemoExample:
    """``Parcel by mail came on 3 May =>`` -> ``Q2``."""
    day = _day(rng)
    month = _MONTHS[day.month - 1]
    text = rng.choice((f"{day.day} {month[:3]}", f"{day.day} {month}", *_full_dates(day)))
    return DemoExample(_dated_prompt(rng, text, tokens - 4), f"Q{(day.month + 2) // 3}")


def _date_iso(rng: Random, tokens: int) -> DemoExample:
    """``Rent paid on Tuesday, 3 March 1987 =>`` -> ``1987-03-03``."""
    day = _day(rng)
    return DemoExample(_dated_prompt(rng, rng.choice(_full_dates(day)), tokens - 12), day.isoformat())


def _day(rng: Random) -> date:
    return _FIRST_DAY + timedelta(days=rng.randrange(_DAYS))


def _full_dates(day: date) -> tuple[str, ...]:
    month = _MONTHS[day.month - 1]
    long = f"{day.day} {month} {day.year}"
    return (
        f"{day.day} {month[:3]} {day.year}",
        long,
        f"{month} {day.day}, {day.year}",
        f"{_WEEKDAYS[day.weekday()]}, {long}",
    )


def _dated_prompt(rng: Random, text: str, prompt_bytes: int) -> str:
    """The date alone where there is no room, else in a sentence with as many modifiers as fit."""
    end = rng.choice(("=", " =>"))
    verb = rng.choice(_VERBS)
    sentence = rng.choice(_SUBJECTS)
    if len(f"{sentence} {verb} {text}{end}") > prompt_bytes:
        return text + end
    for modifier in rng.sample(_MODIFIERS, len(_MODIFIERS)):
        if len(f"{sentence} {modifier} {verb} {text}{end}") <= prompt_bytes:
            sentence = f"{sentence} {modifier}"
    return f"{sentence} {verb} {text}{end}"


def _sort_words(rng: Random, tokens: int) -> DemoExample:
    """``sort: pear fig apple =>`` -> ``apple fig pear``."""
    words = _sample_words(rng, (tokens - 10) // 2)
    return DemoExample(f"sort: {' '.join(words)} =>", " ".join(sorted(words)))


def _sort_first(rng: Random, tokens: int) -> DemoExample:
    """``first of: pear fig apple =>`` -> ``apple``."""
    words = _sample_words(rng, tokens - 20)
    return DemoExample(f"first of: {' '.join(words)} =>", min(words))


def _table_lookup(rng: Random, tokens: int) -> DemoExample:
    """Rows ``pear 31`` and the question ``pear =>`` -> ``31``."""
    table = _table(rng, tokens - 14)
    asked = rng.choice(list(table))
    return DemoExample(f"{_rows(table)}{asked} =>", str(table[asked]))


def _table_maximum(rng: Random, tokens: int) -> DemoExample:
    """Rows ``pear 31`` and the question ``most =>`` -> ``pear``."""
    table = _table(rng, tokens - 14)
    return DemoExample(f"{_rows(table)}most =>", max(table, key=table.__getitem__))


def _table(rng: Random, table_bytes: int) -> dict[str, int]:
    words = _sample_words(rng, table_bytes, bytes_beside_word=4)
    return dict(zip(words, rng.sample(range(1, 100), len(words)), strict=True))  # distinct: one maximum


def _rows(table: Mapping[str, int]) -> str:
    return "".join(f"{word} {number}\n" for word, number in table.items())


def _sample_words(rng: Random, total_bytes: int, *, bytes_beside_word: int = 1) -> list[str]:
    """Distinct words, at least two, that with what stands beside each fill about ``total_bytes``."""
    words = rng.sample(_WORDS, len(_WORDS))
    taken_bytes = 0
    for n, word in enumerate(words):
        if n >= 2 and taken_bytes + (len(word) + bytes_beside_word) / 2 > total_bytes:
            return words[:n]
        taken_bytes += len(word) + bytes_beside_word
    return words


DEMO_DATASETS: Mapping[str, DemoDataset] = MappingProxyType(
    {
        "add": DemoDataset(build=_add, lengths="sst2", max_tokens=64),
        "subtract": DemoDataset(build=_subtract, lengths="sst2", max_tokens=64),
        "date_quarter": DemoDataset(build=_date_quarter, lengths="sst2", max_tokens=64),
        "date_iso": DemoDataset(build=_date_iso, lengths="openbookqa", max_tokens=128),
        "sort_words": DemoDataset(build=_sort_words, lengths="openbookqa", max_tokens=128),
        "sort_first": DemoDataset(build=_sort_first, lengths="openbookqa", max_tokens=128),
        "table_lookup": DemoDataset(build=_table_lookup, lengths="rte", max_tokens=256),
        "table_maximum": DemoDataset(build=_table_maximum, lengths="rte", max_tokens=256),
    }
)
"""Every dataset of the demonstration by name: four kinds of task, three length profiles."""
