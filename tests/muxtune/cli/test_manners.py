"""The command line on inputs and outputs that are no plain files, and on texts that are no plain texts."""

from __future__ import annotations

import json
import os
import stat
import unicodedata

import pytest
import yaml

from tests.muxtune.cli.conftest import task

TASK = task("a", steps=2)
CLUSTER = {
    "name": "own",
    "device": {"name": "a100", "kind": "cuda", "memory_bytes": 80_000_000_000},
    "ranks": 2,
    "within_node": {"name": "mine", "latency_s": 1e-5, "bandwidth_bytes_per_s": 1e11},
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A workload, a cluster and a plan in the working directory."""
    monkeypatch.chdir(tmp_path)
    content = {"backbone": "llama-tiny", "dtype": "bfloat16", "tasks": [TASK]}
    (tmp_path / "w.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CLUSTER))
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


@pytest.fixture
def refused(cli):
    """Plays a command that must end with exit code 2 and one line."""

    def play(*arguments) -> str:
        result = cli(*arguments)
        lines = [line for line in result.err.splitlines() if not line.startswith("muxtune: warning: ")]
        assert result.code == 2, result.err
        assert len(lines) == 1, result.err
        assert lines[0].isprintable()
        return lines[0]

    return play


def plan(*more: object) -> tuple[object, ...]:
    return ("plan", "--workload", "w.yaml", "--cluster", "c.yaml", *more)


@pytest.mark.parametrize("name", ["fifo", "/dev/zero"])
def test_an_input_that_is_no_file_is_refused(files, refused, cli, name):
    cli(*plan())
    table = ("costs", "gemm", "--device", "a40", "--out", "o.csv", "--shapes")
    (files / "endless.csv").symlink_to(name)
    for arguments in (
        ("plan", "--workload", name),
        ("plan", "--workload", "w.yaml", "--cluster", "endless.yaml"),
        plan("--profile", name),
        ("simulate", name),
        ("sweep", name, "--out", "r.parquet"),
        (*table, "endless.csv"),
    ):
        (files / "endless.yaml").unlink(missing_ok=True)
        (files / "endless.yaml").symlink_to(name)
        assert "expected a regular file" in refused(*arguments)


@pytest.mark.parametrize("path", ["fifo", "/dev/zero"])
def test_a_dataset_that_is_no_file_is_refused(files, refused, path):
    content = {"backbone": "llama-tiny", "tasks": [TASK | {"dataset": {"path": path}}]}
    (files / "w.yaml").write_text(yaml.safe_dump(content))
    assert "expected a readable JSONL file (Is a pipe or a device)" in refused(*plan())


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("dataset", {"path": "~no-such-user/x"}, "tasks.a.dataset.path = '~no-such-user/x': expected the"),
        ("dataset", {"path": "a\0b"}, r"tasks.a.dataset.path = 'a\x00b': expected a path without NUL"),
        ("id", "n" * 256, "expected at most 128 characters"),
        ("learning_rate", 1e300, "tasks.0.learning_rate = 1e+300: expected less than or equal to 1000000"),
        ("steps", 10**12, "tasks.0.steps = 1000000000000: expected less than or equal to 10000000"),
        ("global_batch_size", 10**12, "tasks.0.global_batch_size = 1000000000000: expected less than"),
        ("peft", {**TASK["peft"], "alpha": 1e40}, "tasks.0.peft.alpha = 1e+40: expected less than"),
        ("max_grad_norm", float("inf"), "tasks.0.max_grad_norm = inf: expected a finite number"),
    ],
)  # fmt: skip
def test_what_is_absurd_is_refused_with_its_limit(files, refused, field, value, expected):
    content = {"backbone": "llama-tiny", "tasks": [TASK | {field: value}]}
    (files / "w.yaml").write_text(yaml.safe_dump(content))
    assert expected in refused(*plan())


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e400", "1e30"])
@pytest.mark.parametrize("field", ["latency_s", "bandwidth_bytes_per_s"])
def test_a_cluster_has_finite_numbers(files, refused, field, value):
    text = yaml.safe_dump(CLUSTER)
    line = next(line for line in text.splitlines() if field in line)
    (files / "c.yaml").write_text(text.replace(line, f"  {field}: {value}"))
    assert field in refused(*plan())
    assert not (files / "plan.json").exists()


def test_80e9_is_a_number_wherever_one_is_expected(files, cli):
    text = yaml.safe_dump(CLUSTER).replace("80000000000", "80e9").replace("1.0e-05", "1e-5")
    (files / "c.yaml").write_text(text.replace("100000000000.0", "100e9"))
    first = json.loads(cli(*plan("--json")).out)
    assert first["decisions"]["cluster"]["device"]["memory_bytes"] == 80_000_000_000
    assert first["decisions"]["cluster"]["within_node"]["bandwidth_bytes_per_s"] == 1e11
    (files / "w.yaml").write_text((files / "w.yaml").read_text().replace("0.001", "1e-3"))
    assert json.loads(cli(*plan("--json")).out) == first


def test_a_key_that_stands_twice_is_refused_in_every_file(files, refused, cli):
    cli(*plan())
    (files / "w2.yaml").write_text((files / "w.yaml").read_text() + "backbone: gpt2-tiny\n")
    assert "w2.yaml: line " in refused("plan", "--workload", "w2.yaml")
    (files / "c2.yaml").write_text((files / "c.yaml").read_text() + "ranks: 1\n")
    assert "the key ranks stands" in refused("plan", "--workload", "w.yaml", "--cluster", "c2.yaml")
    (files / "s.yaml").write_text("grid: {policy: [nemo], policy: [muxtune]}\n")
    assert "the key policy stands" in refused("sweep", "s.yaml", "--out", "r.parquet")
    text = (files / "plan.json").read_text()
    (files / "plan.json").write_text(text.replace('"policy":', '"policy": "nemo", "policy":', 1))
    assert "plan.json: the key 'policy' stands twice in one object" in refused("simulate", "plan.json")


def test_control_characters_of_files_are_escaped(files, cli, refused):
    evil = "\x1b[31m\u202e\x9b"
    (files / "c.yaml").write_text(yaml.safe_dump({**CLUSTER, "name": f"a{evil}"}))
    shown = cli(*plan()).out
    assert r"on a\x1b[31m\u202e\x9b:" in shown
    assert all(c == "\n" or unicodedata.category(c)[0] != "C" for c in shown)
    (files / "c.yaml").write_text(yaml.safe_dump({**CLUSTER, evil: 1}))
    assert r"c.yaml: \x1b[31m\u202e\x9b = 1: expected no such field" in refused(*plan())
    name = f"w{evil}.yaml"
    assert r"w\x1b[31m\u202e\x9b.yaml: No such file" in refused("plan", "--workload", name)


def test_outputs_are_written_through_or_behind_links(files, cli):
    (files / "link.json").symlink_to("deep/plan.json")
    result = cli(*plan("--out", "link.json"))
    assert result.code == 0, result.err
    assert (files / "link.json").is_symlink()
    assert json.loads((files / "deep" / "plan.json").read_text())["decisions"]["policy"] == "muxtune"
    for trace in ("/dev/null", "/dev/fd/2"):
        assert cli("simulate", "link.json", "--trace", trace).code == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_sweep_may_go_nowhere(files, cli, refused):
    content = {"workload": "w.yaml", "cluster": "c.yaml", "grid": {"policy": ["nemo", "sl-peft"]}}
    (files / "s.yaml").write_text(yaml.safe_dump(content))
    before = set(os.listdir("/dev"))
    done = cli("sweep", "s.yaml", "--out", "/dev/null", "--jobs", "1", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["planned"] == 2
    assert set(os.listdir("/dev")) == before
    assert "expected a file that an earlier sweep" in refused(
        "sweep", "s.yaml", "--out", "/dev/null", "--resume"
    )


def test_a_bad_plan_of_a_user_is_refused_in_our_words(files, cli, refused):
    cli(*plan())
    content = json.loads((files / "plan.json").read_text())
    content["predicted"]["fwd_s"][0][0] = -1.0
    (files / "plan.json").write_text(json.dumps(content))
    assert "predicted.fwd_s.0.0 = -1.0: expected greater than 0" in refused("simulate", "plan.json")
    (files / "plan.json").write_text("[" * 100_000)
    assert "is nested too deeply" in refused("simulate", "plan.json")
