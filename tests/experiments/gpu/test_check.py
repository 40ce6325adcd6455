"""The GPU check where there is no GPU: the comparisons themselves, the report, failing parts, exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from experiments.gpu import attention, check, parity
from experiments.gpu.attention import (
    AttentionCase,
    attention_cases,
    check_attention_case,
    describe_attention,
)
from experiments.gpu.check import PARTS, Part, describe_profile, run_part
from experiments.gpu.kernels import (
    KernelResult,
    LoraCase,
    NormCase,
    Quantity,
    check_case,
    describe_kernels,
    kernel_cases,
)
from experiments.gpu.parity import ParityCase, ParityResult, check_parity, describe_parity, parity_cases
from experiments.gpu.report import Section, write_report
from muxtune.batches import Row
from muxtune.peft.lora import LoraSpec
from runtime.attention import BACKENDS
from tests.interpreter import interpreter
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators

PROFILE = make_profile(analytic_law(), operators())
GOOD = ParityResult(
    case=ParityCase("gpt2-tiny", "float64", "pack"), loss_error=2e-15, gradient_error=3e-14, tolerance=1e-9
)
RIGHT = KernelResult(
    case="LoRA",
    quantities=(Quantity(name="output", error=1e-6, plain_error=2e-6, tolerance=1e-5),),
    repeats=True,
    times_s={"forward": (3e-3, 1.5e-3)},
)
interpreted = pytest.fixture(scope="module")(interpreter)


@pytest.mark.parametrize("stream", attention.STREAMS)
def test_an_attention_backend_agrees_with_the_reference(stream):
    result = check_attention_case(AttentionCase("grouped", "float64", stream), device="cpu")
    assert result.ok
    assert max(result.output_error, result.gradient_error) < 1e-14


def test_an_attention_backend_that_lets_sequences_see_each_other_is_found_out(monkeypatch):
    backend = BACKENDS["grouped"]
    place = backend.place

    def place_as_one(rows, *arguments):
        joined = [part for row in rows for part in row.parts]
        return place([Row(tuple(joined))], *arguments)

    monkeypatch.setattr(backend, "place", place_as_one)
    result = check_attention_case(AttentionCase("grouped", "bfloat16", "mixed, holes"), device="cpu")
    assert not result.ok
    section = describe_attention([result])
    assert not section.ok
    assert section.title == "Attention backends: 1 of 1 cases differ"
    assert "FAILS" in section.text
    assert "flex, loop, masked, varlen" in section.text


def test_every_attention_backend_of_the_device_is_checked_in_every_dtype():
    cases = list(attention_cases("cpu"))
    assert {case.backend for case in cases} == {"grouped", "loop", "masked"}
    assert {case.dtype for case in cases} == {"float64", "float32", "bfloat16"}
    assert len(cases) == 3 * 3 * len(attention.STREAMS)


@pytest.mark.parametrize("model", parity.MODELS)
def test_a_device_agrees_with_itself(model):
    result = check_parity(ParityCase(model, "float64", "chunk"), device="cpu")
    assert result.loss_error == result.gradient_error == 0
    assert result.ok


def test_a_device_that_computes_something_else_is_found_out(monkeypatch):
    """``cpu:0`` plays the other device: its LoRA scale is off by 1e-3, which a loss hardly shows."""
    scale = LoraSpec.scale

    def scale_wrongly(self, path):
        return scale(self, path) * (1.001 if built_for == ["cpu:0"] else 1)

    built_for = []
    compute = parity._losses_and_gradients

    def compute_for(*arguments):
        built_for[:] = arguments[-1:]
        return compute(*arguments)

    monkeypatch.setattr(LoraSpec, "scale", scale_wrongly)
    monkeypatch.setattr(parity, "_losses_and_gradients", compute_for)
    result = check_parity(ParityCase("gpt2-tiny", "float32", "pack"), device="cpu:0")
    assert not result.ok
    assert result.loss_error < result.tolerance < result.gradient_error < 1e-2


def check_one_layer() -> ParityResult:
    """A layer is enough to meet every kernel, and bearable in the interpreter."""
    load = parity.load_model_spec
    parity.load_model_spec = lambda *names: load(*names).model_copy(update={"layers": 1})
    return check_parity(ParityCase("llama-tiny", "float32", "pack", "triton"), device="cpu")


@pytest.mark.slow
def test_a_layer_through_the_kernels_agrees_with_plain_torch(interpreted):
    result = interpreted(check_one_layer)
    assert 0 < result.gradient_error <= result.tolerance  # not the same code, and yet the same result
    assert result.ok


@pytest.mark.parametrize("field", ["loss_error", "gradient_error"])
@pytest.mark.parametrize("value", [2e-9, float("nan")])
def test_an_error_beyond_the_tolerance_or_not_a_number_is_no_parity(field, value):
    assert GOOD.ok
    assert not replace(GOOD, **{field: value}).ok


def test_cases_are_every_model_dtype_and_alignment_once_and_float32_by_the_kernels_too():
    cases = parity_cases()
    assert len(cases) == len(set(cases)) == 2 * 3 * 3
    assert {(c.model.partition("-")[0], c.dtype) for c in cases} == parity.TOLERANCES.keys()
    assert {c.dtype for c in cases if c.kernels == "triton"} == {"float32"}


@pytest.mark.parametrize("case", kernel_cases("cpu"), ids=str)
def test_kernels_are_right_repeat_and_are_timed(interpreted, case):
    result = interpreted(check_case, case, "cpu")
    assert result.ok
    assert all(each.error > 0 and each.plain_error > 0 for each in result.quantities)
    assert result.times_s.keys() == {"forward", "backward"}
    assert all(seconds > 0 for pair in result.times_s.values() for seconds in pair)


def test_on_a_gpu_ranks_and_dtypes_of_real_models_are_checked():
    cases = kernel_cases("cuda")
    assert len({str(case) for case in cases}) == len(cases)
    for dtype in ("float32", "bfloat16"):
        assert any(isinstance(case, NormCase) and case.dtype == dtype for case in cases)
        widest = max(
            (c for c in cases if isinstance(c, LoraCase) and c.dtype == dtype), key=lambda c: len(c.tokens)
        )
        assert {1, 3, 8, 64} <= set(widest.ranks)


@pytest.mark.parametrize(
    "change",
    [
        {"repeats": False},
        {"quantities": (replace(RIGHT.quantities[0], error=2e-5),)},
        {"quantities": (replace(RIGHT.quantities[0], error=float("nan")),)},
    ],
)
def test_a_kernel_that_is_off_or_does_not_repeat_fails(change):
    assert RIGHT.ok
    section = describe_kernels([RIGHT, replace(RIGHT, **change)])
    assert not section.ok
    assert "1 of 2 cases fail" in section.title
    assert section.text.count("FAILS") == 1


def test_report_has_a_row_for_every_case_kernel_and_operator(tmp_path):
    out = tmp_path / "docs" / "report.md"
    sections = [
        describe_parity([GOOD, replace(GOOD, loss_error=1e-3)]),
        describe_kernels([RIGHT]),
        describe_profile(PROFILE),
    ]
    assert [section.ok for section in sections] == [False, True, True]
    write_report(out, "A GPU", sections)
    text = out.read_text()
    assert "A GPU; Python 3." in text
    assert "1 of 2 cases differ" in text
    assert text.count("| gpt2-tiny, float64, pack, torch |") == 2
    assert text.count("FAILS") == 1
    assert re.search(r"\| LoRA +\| forward +\| +3.0 ms \| +1.5 ms \| +2.00 \|", text)
    shapes = dict(re.findall(r"^\| (\w+) +\| (\w+=.*?) +\|", text, re.MULTILINE))
    assert shapes.keys() == {m.op.kind for m in PROFILE.measurements}
    assert shapes["linear"] == "in_features=256, out_features=1376, tokens=4096"


def play(monkeypatch, program: str, limit_s: float = 60) -> None:
    """Let the parts' processes run this program instead; its argument is the path of the result."""
    start = subprocess.Popen

    def start_instead(command, **options):
        return start([sys.executable, "-c", program, command[-1]], **options)

    monkeypatch.setattr(subprocess, "Popen", start_instead)
    for name, part in PARTS.items():
        monkeypatch.setitem(PARTS, name, replace(part, limit_s=limit_s))


def test_a_part_hands_its_section_over(monkeypatch, tmp_path):
    section = Section(title="a part", text="what it found", ok=True)
    content = section.model_dump_json()
    play(monkeypatch, f"import sys, pathlib; pathlib.Path(sys.argv[1]).write_text({content!r})")
    assert run_part("kernels", "cuda", tmp_path) == section


@pytest.mark.parametrize(
    ("program", "limit_s", "reason"),
    [
        (
            "import sys; sys.exit('illegal memory access\\n')",
            60,
            "exit code 1. Its last words:\n\n    illegal",
        ),
        ("import os; os.kill(os.getpid(), 9)", 60, r"exit code -9. Its last words:\n\n    \(none\)"),
        # A grandchild that keeps stderr open ends too.
        (
            "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; "
            "time.sleep(60)']); print('waiting', file=sys.stderr, flush=True); time.sleep(60)",
            2,
            "it took longer than 2 s. Its last words:\n\n    waiting",
        ),
    ],
    ids=["raises", "is killed", "hangs"],
)
def test_a_part_that_ends_early_becomes_a_failed_section(monkeypatch, tmp_path, program, limit_s, reason):
    play(monkeypatch, program, limit_s)
    section = run_part("parity", "cuda", tmp_path)
    assert not section.ok
    assert section.title == "Parity with the CPU: FAILED"
    assert re.search(reason, section.text)


@pytest.mark.parametrize(("failing", "code"), [((), 0), (("kernels",), 1), (("parity", "profile"), 1)])
def test_exit_code_says_whether_all_is_well_and_all_parts_are_in_the_report(
    tmp_path, monkeypatch, capsys, failing, code
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(
        check, "run_part", lambda name, *_: Section(title=name, text="...", ok=name not in failing)
    )
    out = tmp_path / "report.md"
    assert check.main(["--out", str(out)]) == code
    assert re.findall("^## (.*)$", out.read_text(), re.MULTILINE) == list(PARTS)
    assert capsys.readouterr().out == f"written to {out}\n"


def test_the_parts_take_no_more_than_twelve_minutes():
    assert sum(part.limit_s for part in PARTS.values()) <= 12 * 60


def test_a_process_of_a_part_writes_its_section(tmp_path, monkeypatch):
    section = Section(title="a part", text="...", ok=False)
    monkeypatch.setitem(PARTS, "profile", Part("Operators", lambda device: section, 1))
    out = tmp_path / "part.json"
    assert check.main(["--part", "profile", "--out", str(out)]) == 0
    assert Section.model_validate_json(out.read_text()) == section


def test_the_profile_is_a_quick_one_of_the_device(monkeypatch):
    asked = {}
    monkeypatch.setattr("profiler.profile_model", lambda model, **how: asked.update(how) or PROFILE)
    assert check.profile_section("cuda").ok
    assert asked.items() >= {"device": "cuda", "quick": True}.items()


@pytest.mark.slow
def test_the_check_tries_itself_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "report.md"
    command = [sys.executable, "-m", "experiments.gpu.check", "--device", "cpu", "--out", str(out)]
    ended = subprocess.run([*command, "--parts", "kernels"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Parity" not in out.read_text()
    assert "all 4 cases are right" in out.read_text()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has a CUDA device; make gpu-check uses it"
)
def test_without_a_gpu_it_ends_with_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "experiments.gpu.check", "--out", str(tmp_path / "report.md")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("gpu_check: error: no CUDA device on this machine")
    assert not list(tmp_path.iterdir())
