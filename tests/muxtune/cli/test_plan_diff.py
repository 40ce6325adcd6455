"""``muxtune plan diff`` and ``compare --plans``: plans side by side."""

from __future__ import annotations

import yaml


def plans(cli, tmp_path):
    task = {
        "peft": {"method": "lora", "r": 8, "alpha": 16, "targets": ["q_proj"]},
        "dataset": {"lengths": "sst2"},
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "max_length": 64,
        "learning_rate": 1.0e-3,
        "steps": 4,
    }
    content = {"backbone": "llama2-7b", "tasks": [task | {"id": f"t{i}"} for i in range(2)]}
    (tmp_path / "w.yaml").write_text(yaml.safe_dump(content))
    content["tasks"][1]["peft"] = task["peft"] | {"r": 64}
    (tmp_path / "v.yaml").write_text(yaml.safe_dump(content))
    for name, workload, more in (("a", "w", ()), ("b", "v", ("--pp", 2, "--tp", 1, "--dp", 1))):
        command = ("plan", "--workload", tmp_path / f"{workload}.yaml", "--cluster", "testbed-a")
        assert cli(*command, "--out", tmp_path / f"{name}.json", *more).code == 0
    return tmp_path / "a.json", tmp_path / "b.json"


def test_what_differs_is_named_with_both_values(cli, tmp_path):
    first, second = plans(cli, tmp_path)
    result = cli("plan", "diff", first, second, "--json")
    assert result.code == 0, result.err
    differ = {each["field"]: (each["first"], each["second"]) for each in result.json["decisions"]}
    assert differ["tasks.t1.peft.r"] == (8, 64)
    assert differ["parallelism.pp"][1] == 2
    assert not any(field.startswith(("tasks.t0", "model", "cluster")) for field in differ)
    assert result.json["first"]["iteration_s"] != result.json["second"]["iteration_s"]
    text = cli("plan", "diff", first, second).out
    assert "| tasks.t1.peft.r" in text
    assert "| iteration" in text


def test_a_plan_does_not_differ_from_itself(cli, tmp_path):
    first, _ = plans(cli, tmp_path)
    result = cli("plan", "diff", first, first)
    assert result.code == 0
    assert "Both plans decide the same." in result.out
    assert "+0.0 %" in result.out


def test_options_of_plan_do_not_go_with_it(cli, tmp_path):
    result = cli("plan", "--pp", 2, "diff", "a.json", "b.json")
    assert result.code == 2
    assert "do not go with diff" in result.err
    assert cli("plan", "diff", tmp_path / "no.json", tmp_path / "no.json").code == 2


def test_plans_are_compared_against_the_first(cli, tmp_path):
    first, second = plans(cli, tmp_path)
    result = cli("compare", "--plans", first, second, "--picture", tmp_path / "p.png", "--json")
    assert result.code == 0, result.err
    assert [row["policy"] for row in result.json["policies"]] == ["a", "b"]
    rates = [row["predicted"]["effective_tokens_per_s"] for row in result.json["policies"]]
    assert result.json["predicted_speedup"] == {"a": 1.0, "b": rates[1] / rates[0]}
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert cli("compare", "--plans", first, second).out.splitlines()[0].startswith("| plan ")


def test_what_does_not_go_with_plans_is_refused(cli, tmp_path):
    first, second = plans(cli, tmp_path)
    for arguments, words in (
        (("--plans", first), "two plan files"),
        ((first, second), "--plans before plan files"),
        (("--plans", first, second, "--cluster", "testbed-b"), "--cluster = 'testbed-b': expected nothing"),
        ((), "--workload = None"),
    ):
        result = cli("compare", *arguments)
        assert result.code == 2
        assert words in result.err
