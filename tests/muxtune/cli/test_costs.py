from __future__ import annotations

import pytest
import yaml

from muxtune.costs.estimated import usual_errors
from muxtune.costs.kept import kept_profile_path
from muxtune.costs.needs import PLAIN_KINDS
from muxtune.costs.profile import load_profile, save_profile
from muxtune.model import PRESETS
from muxtune.operators import KINDS, Operator
from muxtune.plan import load_plan
from tests.muxtune.cli.conftest import task
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators


@pytest.fixture
def calibrated(monkeypatch):
    """Calls of the calibration, which measures nothing."""
    calls = []

    def calibrate(model, *, ranks, out):
        calls.append((model.name, ranks))
        save_profile(make_profile(analytic_law(model), operators(model), model), out)

    monkeypatch.setattr("profiler.calibration.calibrate", calibrate)
    monkeypatch.setattr("profiler.profile_model", _not_to_be_called)
    return calls


def _not_to_be_called(*_, **__):
    raise AssertionError("measured in vain")


def test_an_unmeasured_backbone_is_estimated_by_a_calibration_that_is_kept(
    cli, write_workload, calibrated, tmp_path
):
    options = ("--workload", write_workload(), "--out", tmp_path / "plan.json")
    first = cli("plan", *options)
    assert first.code == 0, first.err
    assert "nothing is measured on this machine that is like llama-tiny; calibrating" in first.err
    sentence = "estimated from a calibration of a few seconds; "
    assert f"muxtune: warning: costs of llama-tiny are {sentence}" in first.err
    assert f"note on costs: {sentence}" in first.out
    assert "`muxtune profile --model llama-tiny --dtype float32` measures" in first.out
    plan = load_plan(tmp_path / "plan.json")
    assert plan.costs.kind == "estimated"
    error = usual_errors().errors.get("calibration")
    assert plan.costs.usual_error == (error and error.mean)
    assert plan.derived.cost_notes[0].startswith(sentence)
    second = cli("plan", *options)
    assert "calibrating" not in second.err
    assert calibrated == [("llama-tiny", 2)]
    assert load_plan(tmp_path / "plan.json") == plan


def test_what_was_measured_of_a_similar_backbone_estimates_another(cli, write_workload, calibrated, tmp_path):
    kept = kept_profile_path(PRESETS["llama-tiny"], 2)
    save_profile(make_profile(analytic_law(), operators()), kept)
    options = ("--model", "gpt2-tiny", "--out", tmp_path / "plan.json")
    ia3 = task("a", peft={"method": "ia3", "targets": ["all-linear"]})
    result = cli("plan", "--workload", write_workload(ia3), *options)
    assert result.code == 0, result.err
    assert "estimated from what was measured of llama-tiny on this machine" in result.err
    assert "`muxtune profile --model gpt2-tiny --dtype float32 --methods ia3` measures" in result.err
    assert load_plan(tmp_path / "plan.json").costs.kind == "estimated"
    assert not calibrated
    own = kept_profile_path(PRESETS["gpt2-tiny"], 2)
    gpt2 = PRESETS["gpt2-tiny"]
    save_profile(make_profile(analytic_law(gpt2), operators(gpt2), gpt2), own)
    result = cli("plan", "--workload", write_workload(), *options)
    assert result.code == 2  # targets of the workload are another family's
    assert "estimated" not in result.err


def test_the_other_commands_say_that_costs_are_estimated(cli, write_workload, calibrated, tmp_path):
    workload = write_workload()
    result = cli("compare", "--workload", workload, "--policies", "nemo,sl-peft")
    assert result.code == 0, result.err
    assert result.out.count("predicted by estimated costs") == 1
    assert "factor" not in result.err  # by which shapes lie outside of what was measured
    told = cli("compare", "--workload", workload, "--policies", "nemo", "--json").json
    assert told["policies"][0]["costs"]["kind"] == "estimated"
    sweep = tmp_path / "sweep.yaml"
    content = {"workload": str(workload), "cluster": "cpu-2", "grid": {"policy": ["nemo", "sl-peft"]}}
    sweep.write_text(yaml.safe_dump(content))
    result = cli("sweep", sweep, "--out", tmp_path / "r.parquet", "--jobs", "1")
    assert result.code == 0, result.err
    assert "2 planned by estimated costs (column costs_kind)" in result.out
    plan = tmp_path / "plan.json"
    assert cli("plan", "--workload", workload, "--out", plan).code == 0
    result = cli("simulate", plan, "--operators")
    assert result.code == 2
    assert "decisions.costs.kind = 'estimated': expected a plan with measured costs" in result.err


def test_an_estimated_plan_is_priced_again_by_what_is_measured(cli, write_workload, calibrated, tmp_path):
    plan = tmp_path / "plan.json"
    assert cli("plan", "--workload", write_workload(), "--out", plan).code == 0
    kept = kept_profile_path(PRESETS["llama-tiny"], 2)
    profile = make_profile(analytic_law(), operators())
    save_profile(profile, kept)
    result = cli("plan", "--reprice", plan)
    assert result.code == 0, result.err
    assert f"priced with {profile.profile_id}; the plan was made with estimates" in result.err
    assert load_plan(plan).costs.kind == "measured"


def test_what_a_later_workload_needs_is_measured_then_and_comes_to_the_profile(
    cli, write_workload, monkeypatch, tmp_path
):
    asked = []

    def measure(model, *, out, kinds, **options):
        former = load_profile(out) if out.exists() else None
        asked.append(kinds - PLAIN_KINDS - (former.kinds if former else set()))
        ops = [op for op in operators() if op.kind != "dropout"]
        for kind in kinds - PLAIN_KINDS:
            ops += [Operator(kind, dims) for dims in KINDS[kind].grid(model, True)]
        save_profile(make_profile(analytic_law(), ops), out)

    monkeypatch.setattr("profiler.profile_model", measure)
    plan = tmp_path / "plan.json"

    def planned(*tasks):
        result = cli("plan", "--workload", write_workload(*tasks))
        assert result.code == 0, result.err
        return load_plan(plan), result.err

    measure(
        PRESETS["llama-tiny"],
        out=kept_profile_path(PRESETS["llama-tiny"], 2),
        kinds=PLAIN_KINDS,
    )
    plain, _ = planned(task("a"))
    vectors, said = planned(task("a", peft=IA3))
    assert "the profile of llama-tiny has no ia3 yet; measuring this machine into" in said
    both, _ = planned(task("a", peft=IA3), task("b", peft=DROPPED))
    assert asked == [set(), {"ia3"}, {"dropout"}]
    # What was measured later for others changes neither prices nor identity.
    assert planned(task("a"))[0] == plain
    assert planned(task("a", peft=IA3))[0] == vectors
    assert plain.costs.profile_id == vectors.costs.profile_id == both.costs.profile_id
    assert len({each.costs.digest for each in (plain, vectors, both)}) == 3
    assert len(asked) == 3


def test_a_given_profile_without_what_tasks_need_is_refused_with_what_adds_it(
    cli, write_workload, profile_path, tmp_path
):
    workload = write_workload(task("a", peft=IA3))
    result = cli("plan", "--workload", workload, "--profile", profile_path)
    assert result.code == 2
    assert (
        f"--profile = '{profile_path}': expected a profile with ia3, which tasks need: "
        f"muxtune profile --out {profile_path} --methods ia3 adds what is missing"
    ) in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "plan.json").exists()


IA3 = {"method": "ia3", "targets": ["k_proj", "v_proj"], "feedforward": []}
DROPPED = {"method": "lora", "r": 8, "alpha": 16, "targets": ["q_proj"], "dropout": 0.1}


def test_nothing_is_measured_for_a_workload_whose_data_is_missing(cli, write_workload, monkeypatch):
    monkeypatch.setattr("profiler.profile_model", _not_to_be_called)
    save_profile(
        make_profile(analytic_law(), operators()),
        kept_profile_path(PRESETS["llama-tiny"], 2),
    )
    result = cli("plan", "--workload", write_workload(task("a", dataset={"path": "no.jsonl"}, peft=IA3)))
    assert result.code == 2
    assert "expected a readable JSONL file" in result.err


def gpu_cluster(tmp_path, device):
    path = tmp_path / "cluster.yaml"
    link = {"name": "own", "latency_s": 1e-5, "bandwidth_bytes_per_s": 5e10}
    memory_bytes = 48 * 2**30
    cluster = {
        "name": "two",
        "device": {"name": device, "kind": "cuda", "memory_bytes": memory_bytes},
        "ranks": 2,
        "within_node": link,
    }
    path.write_text(yaml.safe_dump(cluster))
    return path


@pytest.mark.parametrize("device", ["a40", "a100", "h100"])
def test_a_gpu_is_priced_by_its_coefficients(cli, write_workload, tmp_path, device):
    workload = write_workload(dtype="bfloat16")
    result = cli("plan", "--workload", workload, "--cluster", gpu_cluster(tmp_path, device))
    assert result.code == 0, result.err
    assert load_plan(tmp_path / "plan.json").costs.profile_id.startswith(f"analytic-{device}-")
    assert "float32" not in result.err
    assert not (tmp_path / "cache").exists()


def test_a_testbed_of_the_paper_needs_no_profile(cli, write_workload, tmp_path):
    tasks = [task("a", max_length=128), task("b", dataset={"lengths": "rte"}, max_length=256)]
    workload = write_workload(*tasks, dtype="bfloat16")
    result = cli("plan", "--workload", workload, "--model", "llama2-7b", "--cluster", "testbed-a")
    assert result.code == 0, result.err
    plan = load_plan(tmp_path / "plan.json")
    assert plan.costs.device == "a40"
    assert 1_000 < plan.predicted.tokens_per_s < 40_000


def test_float32_on_a_gpu_is_priced_with_a_warning(cli, write_workload, tmp_path):
    result = cli("plan", "--workload", write_workload(), "--cluster", gpu_cluster(tmp_path, "a100"))
    assert result.code == 0, result.err
    assert "muxtune: warning: llama-tiny in float32 leaves the tensor cores of a100 idle" in result.err


def test_a_gpu_without_coefficients_needs_a_profile(cli, write_workload, tmp_path):
    result = cli("plan", "--workload", write_workload(), "--cluster", gpu_cluster(tmp_path, "b200"))
    assert result.code == 2
    assert "--profile = None: expected a profile of b200; coefficients ship for a100, a40, h100" in result.err


def test_what_changes_the_costs_changes_the_kept_file(monkeypatch, tmp_path):
    monkeypatch.setenv("MUXTUNE_CACHE", str(tmp_path))
    tiny = PRESETS["llama-tiny"]
    variants = [
        (tiny, 2),
        (tiny, 1),
        (tiny.model_copy(update={"dtype": "float64"}), 2),
        (tiny.model_copy(update={"hidden": 128}), 2),
        (PRESETS["gpt2-tiny"], 2),
    ]
    paths = {kept_profile_path(model, ranks) for model, ranks in variants}
    assert len(paths) == len(variants)
    other_weights = tiny.model_copy(update={"init_seed": 7})
    assert kept_profile_path(other_weights, 2) in paths


@pytest.mark.parametrize(
    ("target", "value"),
    [
        ("muxtune.costs.conditions.processor_name", lambda: "Another Core"),
        ("muxtune.costs.conditions.usable_cores", lambda: 7),
        ("muxtune.costs.conditions.package_version", lambda package: "0.0"),
        ("muxtune.costs.conditions.PROFILE_FORMAT", 99),
        ("platform.node", lambda: "another-host"),
        ("platform.machine", lambda: "riscv64"),
        ("platform.python_version", lambda: "3.99"),
    ],
)
def test_what_changes_speed_changes_the_kept_file(monkeypatch, tmp_path, target, value):
    monkeypatch.setenv("MUXTUNE_CACHE", str(tmp_path))
    tiny = PRESETS["llama-tiny"]
    before = kept_profile_path(tiny, 2)
    assert kept_profile_path(tiny, 2) == before
    monkeypatch.setattr(target, value)
    assert kept_profile_path(tiny, 2) != before


@pytest.mark.parametrize("variable", ["MUXTUNE_KERNELS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"])
def test_settings_of_kernels_change_the_kept_file(monkeypatch, tmp_path, variable):
    monkeypatch.setenv("MUXTUNE_CACHE", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    before = kept_profile_path(PRESETS["llama-tiny"], 2)
    monkeypatch.setenv(variable, "torch")
    assert kept_profile_path(PRESETS["llama-tiny"], 2) != before


def test_a_profile_of_another_kind_of_device_is_refused(cli, write_workload, profile_path, tmp_path):
    options = ("--workload", write_workload(), "--profile", profile_path, "--cluster", "testbed-a")
    for command in (("plan",), ("compare", "--policies", "nemo")):
        result = cli(*command, *options)
        assert result.code == 2
        assert f"{profile_path}: device = 'cpu': expected 'cuda': testbed-a has devices of" in result.err
    assert not (tmp_path / "plan.json").exists()


def test_doubts_are_said_on_stderr_in_the_summary_and_in_the_plan(
    cli, write_workload, profile_path, tmp_path
):
    options = ("--workload", write_workload(), "--profile", profile_path)
    result = cli("plan", *options, "--cluster", "cpu-4")
    assert result.code == 0, result.err
    doubt = "measured with 2 ranks at a time, and cpu-4 has 4"
    assert f"muxtune: warning: {profile_path}: {doubt}" in result.err
    assert f"note on costs: {doubt}" in result.out
    assert load_plan(tmp_path / "plan.json").derived.cost_notes[0].startswith(doubt)
    assert doubt not in cli("plan", *options, "--cluster", "cpu-2").err
    assert "that are reserved for interpreter and drivers" in result.out


def test_more_ranks_in_a_sum_than_were_measured_are_refused(cli, write_workload, profile_path):
    options = ("--workload", write_workload(), "--profile", profile_path, "--cluster", "cpu-4")
    assert cli("plan", *options, "--tp", "2").code == 0
    result = cli("plan", *options, "--tp", "4")
    assert result.code == 2
    assert "--tp and --dp = '4 and 1': expected at most 2, the ranks of the largest collective" in result.err
