"""Do mutated inputs end in a result or in one line of refusal?

    python -m benchmarks.fuzz [--count 1000] [--seed 0] [--limit 10]

A workload is planned and a plan is simulated, each in many mutated versions: every second one has an extreme
value in one field, the others are mutated at random, as values or as text. Counted are

accepted   exit code 0, and what was written can be read back
refused    exit code 2 and one printable line in our own words
failed     anything else: a traceback, pydantic's words, several lines, a plan that cannot be read back
late       no end within ``--limit`` processor seconds, or ten times that by the clock

All runs are in one process, through the command line's own door. Exit code 1 if any failed or was late.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from muxtune.cli.app import main as muxtune
from muxtune.plan import load_plan
from muxtune.support.errors import UserError
from muxtune.support.tables import format_table

Kind = Literal["workload", "plan"]
Verdict = Literal["accepted", "refused", "failed", "late"]

KINDS: tuple[Kind, ...] = ("workload", "plan")
VERDICTS: tuple[Verdict, ...] = ("accepted", "refused", "failed", "late")

HUGE = "@HUGE@"
"""Stands for an integer of 5,000 digits, which Python writes for nobody."""

EXTREMES: tuple[Any, ...] = (
    None,
    True,
    "",
    "x",
    "x" * 256,
    "x" * 100_000,
    "\0",
    "\x1b[31m",
    "\u202egnp",
    "two\nlines",
    "~nobody-here/x",
    "../../x",
    "/dev/zero",
    "a b",
    "80e9",
    "1e400",
    "$x_{1}$",
    0,
    -1,
    1,
    2,
    3,
    0.5,
    10**6,
    10**12,
    2**31,
    2**63,
    10**40,
    -(10**40),
    HUGE,
    1e-320,
    1e-12,
    1e40,
    1e308,
    -1e308,
    math.inf,
    -math.inf,
    math.nan,
    [],
    [[]],
    [None],
    ["x"] * 1000,
    {},
    {"a": 1},
    {"a": {"a": {"a": {}}}},
)

WORDS = ("Input should", "validation error", "pydantic", "Value error", "unable to parse", "Traceback")
_CLOCK = 10

MOST_CHARACTERS = 1000
"""Characters of a refusal beside the names of files, at most."""

Path_ = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One mutated input."""

    kind: Kind
    mutation: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a case."""

    case: Case
    verdict: Verdict
    said: str
    seconds: float
    """Seconds of the processor."""


def base_workload(folder: Path) -> dict[str, Any]:
    """Two small tasks, one on a file and one on a histogram."""
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps({"prompt": "1+1=", "completion": str(i)}) + "\n" for i in range(20)))
    task = {
        "id": "a",
        "peft": {"method": "lora", "r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"], "dropout": 0.1},
        "dataset": {"path": str(data)},
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "max_length": 32,
        "learning_rate": 1e-3,
        "lr_schedule": "linear",
        "warmup_steps": 1,
        "steps": 3,
        "seed": 1,
        "shuffle": True,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    }
    other = {**copy.deepcopy(task), "id": "b", "dataset": {"lengths": "sst2"}}
    return {"backbone": "llama-tiny", "dtype": "bfloat16", "tasks": [task, other]}


def base_plan(folder: Path) -> dict[str, Any]:
    """The plan of that workload on two GPUs."""
    (folder / "base.yaml").write_text(yaml.safe_dump(base_workload(folder)))
    arguments = ["plan", "--workload", str(folder / "base.yaml"), "--cluster", "a100-2", "--pp", "2"]
    _play([*arguments, "--out", str(folder / "base.json")], limit_s=600)
    content: dict[str, Any] = json.loads((folder / "base.json").read_text())
    return content


def cases(kind: Kind, base: dict[str, Any], count: int, seed: int) -> Iterator[Case]:
    """Mutated versions, every second one with one extreme value."""
    draw = random.Random(f"{kind} {seed}")
    text = _text(kind, base)
    extremes = extreme_values(base, draw)
    for number in range(count):
        if number % 2:
            path, extreme = extremes[number // 2 % len(extremes)]
            changed = copy.deepcopy(base)
            _put(changed, path, extreme)
            yield Case(kind, f"{_name(path)} = {_short(extreme)}", _text(kind, changed))
        elif draw.random() < 0.5:  # noqa: PLR2004  # half of them
            mutate = draw.choice(_TREE_MUTATIONS)
            changed = copy.deepcopy(base)
            yield Case(kind, mutate(changed, draw), _text(kind, changed))
        else:
            content = bytearray(text)
            names = [draw.choice(_TEXT_MUTATIONS)(content, draw) for _ in range(draw.choice((1, 1, 2, 5)))]
            yield Case(kind, ", ".join(names), bytes(content))


def extreme_values(base: dict[str, Any], draw: random.Random) -> list[tuple[Path_, Any]]:
    """Every extreme value for every field, in random order."""
    pairs = [(path, extreme) for path in _paths(base) for extreme in EXTREMES]
    draw.shuffle(pairs)
    return pairs


def play(case: Case, folder: Path, limit_s: float) -> Result:
    """Plan a workload or simulate a plan, and judge how it ends."""
    start_s = time.process_time()
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    if case.kind == "workload":
        source = folder / "case.yaml"
        arguments = ["plan", "--workload", str(source), "--cluster", "a100-2", "--out", str(out), "--json"]
    else:
        source = folder / "case.json"
        arguments = ["simulate", str(source), "--json"]
    source.write_bytes(case.content)
    try:
        code, stdout, stderr = _play(arguments, limit_s)
        verdict, said = _judge(case.kind, code, stdout, stderr, out)
    except _TimeIsUpError:
        verdict, said = "late", f"no end within {limit_s:g} s"
    return Result(case, verdict, said, time.process_time() - start_s)


def _judge(kind: Kind, code: int, stdout: str, stderr: str, out: Path) -> tuple[Verdict, str]:
    if code == 0:
        try:
            if kind == "workload":
                load_plan(out)
            json.loads(stdout, parse_constant=_no_constant)
        except (UserError, ValueError) as error:
            return "failed", f"what was written cannot be read back: {error}"
        return "accepted", ""
    lines = [line for line in stderr.splitlines() if not line.startswith("muxtune: warning: ")]
    said = "\n".join(lines)
    right = (
        code == 2  # a mistake of the user
        and len(lines) == 1
        and said.startswith("muxtune: error: ")
        and said.isprintable()
        and len(said) <= MOST_CHARACTERS
        and not any(word in said for word in WORDS)
        and not out.exists()
    )
    return ("refused" if right else "failed"), f"exit code {code}: {said}"


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


class _TimeIsUpError(BaseException):
    """No ``except Exception`` holds it up."""


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise after that time of the processor, or ten times that by the clock; machines are shared.

    A timer that was there before gets what it has left.
    """

    def end(*_: object) -> None:
        raise _TimeIsUpError

    signals = (signal.SIGPROF, signal.SIGALRM)
    former_handlers = [signal.signal(each, end) for each in signals]
    start_s = time.perf_counter()
    signal.setitimer(signal.ITIMER_PROF, seconds)
    left_s, _ = signal.setitimer(signal.ITIMER_REAL, _CLOCK * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in zip(signals, former_handlers, strict=True):
            signal.signal(each, handler)
        if left_s:
            signal.setitimer(signal.ITIMER_REAL, max(left_s - (time.perf_counter() - start_s), 1e-3))


def _play(arguments: Sequence[str], limit_s: float) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    out, err = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err), _limit(limit_s):
        try:
            muxtune(list(arguments))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return code, out.getvalue(), err.getvalue()


def _text(kind: Kind, content: object) -> bytes:
    text = yaml.safe_dump(content, sort_keys=False) if kind == "workload" else json.dumps(content, indent=1)
    for quoted in (f"'{HUGE}'", f'"{HUGE}"', HUGE):
        text = text.replace(quoted, "9" * 5000)
    return text.encode()


def _paths(content: object, path: Path_ = ()) -> Iterator[Path_]:
    """Paths of every value inside; of long lists those of the first and the last."""
    entries: list[tuple[Any, Any]] = []
    if isinstance(content, dict):
        entries = list(content.items())
    elif isinstance(content, list):
        entries = [(i, content[i]) for i in sorted({0, len(content) - 1} & set(range(len(content))))]
    for key, value in entries:
        yield (*path, key)
        yield from _paths(value, (*path, key))


def _put(content: Any, path: Path_, value: object) -> None:  # noqa: ANN401  # nested plain data
    *before, last = path
    for key in before:
        content = content[key]
    content[last] = copy.deepcopy(value)


def _at(content: Any, path: Path_) -> Any:  # noqa: ANN401  # nested plain data
    for key in path:
        content = content[key]
    return content


def _name(path: Path_) -> str:
    return ".".join(map(str, path))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."  # a column


def _delete(content: Any, draw: random.Random) -> str:  # noqa: ANN401
    path = draw.choice(list(_paths(content)))
    del _at(content, path[:-1])[path[-1]]
    return f"without {_name(path)}"


def _rename(content: Any, draw: random.Random) -> str:  # noqa: ANN401
    path = draw.choice([path for path in _paths(content) if isinstance(path[-1], str)])
    holder, name = _at(content, path[:-1]), draw.choice(("x", "", path[-1].upper(), "\x1b[2J", "k" * 1000))
    holder[name] = holder.pop(path[-1])
    return f"{_name(path)} as {_short(name)}"


def _exchange(content: Any, draw: random.Random) -> str:  # noqa: ANN401
    one, other = draw.sample(list(_paths(content)), 2)
    _put(content, one, _at(content, other))
    return f"{_name(one)} as {_name(other)}"


def _wrap(content: Any, draw: random.Random) -> str:  # noqa: ANN401
    path = draw.choice(list(_paths(content)))
    value = _at(content, path)
    _put(content, path, draw.choice(([value], {"x": value}, str(value), [value, value])))
    return f"{_name(path)} wrapped"


def _scale(content: Any, draw: random.Random) -> str:  # noqa: ANN401
    def is_number(path: Path_) -> bool:
        return type(_at(content, path)) in {int, float}

    path = draw.choice([path for path in _paths(content) if is_number(path)])
    value = _at(content, path)
    _put(
        content,
        path,
        draw.choice((value + 1, value - 1, 2 * value, -value, value / 3, value // 2, value + 0.5)),
    )
    return f"{_name(path)} = {_short(_at(content, path))}"


_TREE_MUTATIONS: tuple[Callable[[Any, random.Random], str], ...] = (
    _delete,
    _rename,
    _exchange,
    _wrap,
    _scale,
)


def _cut(content: bytearray, draw: random.Random) -> str:
    start = draw.randrange(len(content) + 1)
    stop = min(len(content), start + draw.choice((1, 2, 10, 100)))
    del content[start:stop]
    return f"without bytes {start} to {stop}"


def _truncate(content: bytearray, draw: random.Random) -> str:
    stop = draw.randrange(len(content) + 1)
    del content[stop:]
    return f"cut at {stop}"


def _overwrite(content: bytearray, draw: random.Random) -> str:
    start = draw.randrange(len(content) + 1)
    content[start : start + 1] = bytes([draw.randrange(256)])
    return f"another byte at {start}"


def _insert(content: bytearray, draw: random.Random) -> str:
    start = draw.randrange(len(content) + 1)
    piece = draw.choice(
        (b"\0", b"\xff", b"\n", b"[" * 5000, b"{", b"&a ", b"*a", b"!!x ", b"9" * 5000, b"\t", b": ")
    )
    content[start:start] = piece
    return f"{piece[:8]!r} at {start}"


def _repeat_line(content: bytearray, draw: random.Random) -> str:
    lines = bytes(content).splitlines(keepends=True) or [b""]
    number = draw.randrange(len(lines))
    lines.insert(draw.randrange(len(lines) + 1), lines[number])
    content[:] = b"".join(lines)
    return f"line {number + 1} twice"


_TEXT_MUTATIONS: tuple[Callable[[bytearray, random.Random], str], ...] = (
    _cut,
    _truncate,
    _overwrite,
    _insert,
    _repeat_line,
)


def fuzz(kind: Kind, folder: Path, *, count: int, seed: int, limit_s: float) -> list[Result]:
    """Play ``count`` mutated inputs of a kind."""
    base = base_workload(folder) if kind == "workload" else base_plan(folder)
    results = []
    for case in cases(kind, base, count, seed):
        results.append(play(case, folder, limit_s))
        if len(results) % 100 == 0:
            sys.stderr.write(f"{kind}: {len(results)}\n")
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Play both kinds, print the counts and what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=10.0, help="processor seconds for each")
    given = parser.parse_args(arguments)
    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as name:
        for kind in KINDS:
            results = fuzz(kind, Path(name), count=given.count, seed=given.seed, limit_s=given.limit)
            counts = Counter(result.verdict for result in results)
            slowest = max(results, key=lambda result: result.seconds)
            rows.append([kind, *(str(counts[verdict]) for verdict in VERDICTS), f"{slowest.seconds:.1f} s"])
            wrong += [result for result in results if result.verdict in {"failed", "late"}]
    print(format_table(["input", *VERDICTS, "slowest"], rows))
    for result in wrong:
        print(f"\n{result.case.kind}: {result.case.mutation}\n  {result.said[:300]}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
