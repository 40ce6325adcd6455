"""The GPU check where there is no GPU: the comparison itself, the report, the exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from experiments import gpu_check
from experiments.gpu_check import ParityCase, ParityResult, check_parity, parity_cases, write_report
from runtime.lora import SharedLinear
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators

PROFILE = make_profile(analytic_law(), operators())
GOOD = ParityResult(
    case=ParityCase("gpt2-tiny", "float64", "pack"), loss_error=2e-15, gradient_error=3e-14, tolerance=1e-9
)


@pytest.mark.parametrize("model", gpu_check.MODELS)
def test_a_device_agrees_with_itself(model):
    result = check_parity(ParityCase(model, "float64", "chunk"), device="cpu")
    assert result.loss_error == result.gradient_error == 0
    assert result.ok


def test_a_device_that_computes_something_else_is_found_out(monkeypatch):
    """``cpu:0`` plays the other device: its LoRA scale is off by 1e-3, which a loss hardly shows."""
    attach = SharedLinear.attach

    def attach_wrongly(self, task_id, name, a_RI, b_OR, scale):  # noqa: N803  # shape letters
        attach(self, task_id, name, a_RI, b_OR, scale * (1.001 if built_for == ["cpu:0"] else 1))

    built_for = []
    compute = gpu_check._losses_and_gradients

    def compute_for(*arguments):
        built_for[:] = arguments[-1:]
        return compute(*arguments)

    monkeypatch.setattr(SharedLinear, "attach", attach_wrongly)
    monkeypatch.setattr(gpu_check, "_losses_and_gradients", compute_for)
    result = check_parity(ParityCase("gpt2-tiny", "float32", "pack"), device="cpu:0")
    assert not result.ok
    assert result.loss_error < result.tolerance < result.gradient_error < 1e-2


@pytest.mark.parametrize("field", ["loss_error", "gradient_error"])
@pytest.mark.parametrize("value", [2e-9, float("nan")])
def test_an_error_beyond_the_tolerance_or_not_a_number_is_no_parity(field, value):
    assert GOOD.ok
    assert not replace(GOOD, **{field: value}).ok


def test_cases_are_every_model_dtype_and_alignment_once():
    cases = parity_cases()
    assert len(cases) == len(set(cases)) == 2 * 2 * 3
    assert {(c.model.partition("-")[0], c.dtype) for c in cases} == gpu_check.TOLERANCES.keys()


def test_report_has_a_row_for_every_case_and_operator(tmp_path):
    out = tmp_path / "docs" / "report.md"
    write_report(out, "A GPU", [GOOD, replace(GOOD, loss_error=1e-3)], PROFILE)
    text = out.read_text()
    assert "A GPU; Python 3." in text
    assert "1 of 2 cases differ" in text
    assert text.count("| gpt2-tiny, float64, pack |") == 2
    assert text.count("FAILS") == 1
    shapes = dict(re.findall(r"^\| (\w+) +\| (\w+=.*?) +\|", text, re.MULTILINE))
    assert shapes.keys() == {m.op.kind for m in PROFILE.measurements}
    assert shapes["linear"] == "in_features=256, out_features=1376, tokens=4096"


@pytest.mark.parametrize(("gradient_error", "code"), [(0.0, 0), (1.0, 1)])
def test_exit_code_says_whether_all_agree_and_the_report_is_there(
    tmp_path, monkeypatch, capsys, gradient_error, code
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr("profiler.profile_model", lambda *_, **__: PROFILE)
    monkeypatch.setattr(
        gpu_check,
        "check_parity",
        lambda case, *, device: replace(GOOD, case=case, gradient_error=gradient_error),
    )
    out = tmp_path / "report.md"
    assert gpu_check.main(["--out", str(out)]) == code
    assert out.is_file()
    assert capsys.readouterr().out == f"written to {out}\n"


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has a CUDA device; make gpu-check uses it"
)
def test_without_a_gpu_it_ends_with_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "experiments.gpu_check", "--out", str(tmp_path / "report.md")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("gpu_check: error: no CUDA device on this machine")
    assert not list(tmp_path.iterdir())
