"""Mutated workloads and plans end in a result or in one line of refusal."""

from __future__ import annotations

import random
import time

import pytest

from benchmarks import fuzz

LIMIT_S = 20.0
"""For a hang; no test is about time."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_hundred_mutated_inputs_are_accepted_or_refused(kind, tmp_path):
    results = fuzz.fuzz(kind, tmp_path, count=100, seed=11, limit_s=LIMIT_S)
    wrong = [
        (result.case.mutation, result.said) for result in results if result.verdict in {"failed", "late"}
    ]
    assert not wrong
    verdicts = {result.verdict for result in results}
    assert verdicts == {"accepted", "refused"}  # the mutations are neither all harmless nor all fatal


def test_every_field_gets_every_extreme(tmp_path):
    base = fuzz.base_workload(tmp_path)
    fields = set(fuzz._paths(base))
    assert {
        ("backbone",),
        ("tasks",),
        ("tasks", 0, "peft", "alpha"),
        ("tasks", 1, "dataset", "lengths"),
    } <= fields
    pairs = fuzz.extreme_values(base, random.Random(0))
    assert len({(path, str(extreme)) for path, extreme in pairs}) == len(fields) * len(fuzz.EXTREMES)


def test_the_same_seed_gives_the_same_inputs(tmp_path):
    base = fuzz.base_workload(tmp_path)
    first, again, other = (list(fuzz.cases("workload", base, 40, seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "verdict"),
    [
        (2, "", "muxtune: error: x = 3: expected 4\n", "refused"),
        (2, "", "muxtune: warning: w\nmuxtune: error: x\n", "refused"),
        (1, "", "muxtune: error: KeyError: 'x' (MUXTUNE_DEBUG=1 shows where)\n", "failed"),
        (2, "", "muxtune: error: a\nb\n", "failed"),
        (2, "", "muxtune: error: \x1b[31m\n", "failed"),
        (2, "", "muxtune: error: x: Input should be a valid string\n", "failed"),
        (2, "", "", "failed"),
        (0, "{}", "", "accepted"),
        (0, '{"iteration_s": NaN}', "", "failed"),
    ],
)
def test_the_judge_knows_right_from_wrong(tmp_path, code, stdout, stderr, verdict):
    assert fuzz._judge("plan", code, stdout, stderr, tmp_path / "out.json")[0] == verdict


def test_a_run_that_does_not_end_is_late(tmp_path, monkeypatch):
    def hang(arguments):
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue

    monkeypatch.setattr(fuzz, "muxtune", hang)
    case = fuzz.Case("plan", "none", b"{}")
    assert fuzz.play(case, tmp_path, 0.2).verdict == "late"
