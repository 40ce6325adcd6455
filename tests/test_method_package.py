"""The example of a PEFT method of one's own: installed, found through its entry points, and exact."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.documents import ROOT, load_page
from tests.installed import install, run_muxtune, run_python

PACKAGE = ROOT / "examples" / "method-package"

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    return install(PACKAGE, tmp_path_factory.mktemp("method"))


def test_it_is_planned_and_priced_on_gpus_beside_lora(installed, tmp_path):
    common = {"dataset": {"lengths": "sst2"}, "global_batch_size": 8, "micro_batch_size": 4}
    common |= {"max_length": 64, "learning_rate": 1e-3, "steps": 3}
    pefts = {
        "heads": {"method": "head_scale"},
        "lora": {"method": "lora", "r": 8, "alpha": 8, "targets": ["q_proj"]},
    }
    tasks = [{"id": name, "peft": peft, **common} for name, peft in pefts.items()]
    (tmp_path / "w.yaml").write_text(yaml.safe_dump({"backbone": "llama2-7b", "tasks": tasks}))
    options = [
        "--workload",
        "w.yaml",
        "--cluster",
        "testbed-a",
        "--partition",
        "heads+lora",
        "--tp",
        "2",
        "--json",
    ]
    planned = run_muxtune(installed, "plan", *options, cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["predicted"]["iteration_s"] > 0
    missing = run_muxtune(tmp_path, "plan", *options, cwd=tmp_path)
    assert missing.returncode == 2
    assert "head_scale" in missing.stderr


def test_its_own_tests_pass_where_it_is_installed(installed):
    ran = run_python(
        installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=installed.parent / "source"
    )
    assert ran.returncode == 0, ran.stdout
    assert re.search(r"\d+ passed", ran.stdout)


@pytest.mark.parametrize("name", ["method.py", "execution.py"])
def test_the_page_has_the_modules_as_they_are(name):
    assert load_page("docs/methods.md").example(name) == (PACKAGE / "muxtune_head_scale" / name).read_text()
