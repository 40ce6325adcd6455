"""The example of a PEFT method of one's own: installed, found through its entry points, and exact."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.documents import ROOT, load_page

PACKAGE = ROOT / "examples" / "method-package"

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that the package is installed into; pip builds it where it lies, so from a copy."""
    folder = tmp_path_factory.mktemp("method")
    source = shutil.copytree(PACKAGE, folder / "source")
    target = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Nothing is fetched: setuptools comes with torch, and muxtune is here already.
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, *offline, "--target", str(target), str(source)], check=True, timeout=120)
    return target


def run(installed: Path, arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """A process that sees the folder as a place of packages."""
    paths = [str(installed), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def test_it_is_planned_and_priced_on_gpus_beside_lora(installed, tmp_path):
    common = {"dataset": {"lengths": "sst2"}, "global_batch_size": 8, "micro_batch_size": 4}
    common |= {"max_length": 64, "learning_rate": 1e-3, "steps": 3}
    pefts = {
        "heads": {"method": "head_scale"},
        "lora": {"method": "lora", "r": 8, "alpha": 8, "targets": ["q_proj"]},
    }
    tasks = [{"id": name, "peft": peft, **common} for name, peft in pefts.items()]
    (tmp_path / "w.yaml").write_text(yaml.safe_dump({"backbone": "llama2-7b", "tasks": tasks}))
    program = "import sys; from muxtune.cli.app import main; main(sys.argv[1:])"
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
    planned = run(installed, ["-c", program, "plan", *options], tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["predicted"]["iteration_s"] > 0
    missing = run(tmp_path, ["-c", program, "plan", *options], tmp_path)
    assert missing.returncode == 2
    assert "head_scale" in missing.stderr


def test_its_own_tests_pass_where_it_is_installed(installed):
    ran = run(
        installed, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"], installed.parent / "source"
    )
    assert ran.returncode == 0, ran.stdout
    assert re.search(r"\d+ passed", ran.stdout)


@pytest.mark.parametrize("name", ["method.py", "execution.py"])
def test_the_page_has_the_modules_as_they_are(name):
    assert load_page("docs/methods.md").example(name) == (PACKAGE / "muxtune_head_scale" / name).read_text()
