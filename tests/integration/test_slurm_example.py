"""The SLURM script: its requests parse, and against stand-ins for SLURM's commands it trains on two nodes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from muxtune.model import load_model_spec
from muxtune.plan import save_plan
from muxtune.tasks import Workload
from runtime import load_report
from tests.helpers import make_plan, make_task, write_examples

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("bash") is None, reason="no bash"),
]

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm" / "train.sbatch"

STAND_INS = {
    # Each node has its own number; the job fails with the first node that does.
    "srun": """
[[ $1 == --kill-on-bad-exit=1 ]] || exit 64
shift
for node in 0 1; do SLURM_NODEID=$node "$@" & nodes+=($!); done
for node in "${nodes[@]}"; do wait "$node" || exit 1; done
""",
    "scontrol": """
[[ "$*" == "show hostnames node[1-2]" ]] || exit 64
printf '127.0.0.1\\n127.0.0.2\\n'
""",
    "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"\n',
    "muxtune": f'exec "{sys.executable}" -c "from muxtune.cli.app import main; main()" "$@"\n',
}


def _requests() -> dict[str, str]:
    """What the script asks SLURM for; that reads the lines before the first command."""
    head = SCRIPT.read_text().split("\nset ")[0]
    lines = [line for line in head.splitlines() if line.startswith("#SBATCH")]
    matches = [re.fullmatch(r"#SBATCH --([a-z-]+)=(\S+)", line) for line in lines]
    assert all(matches), lines
    return {match[1]: match[2] for match in matches if match}


def _sbatch(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    bin_ = folder / "bin"
    bin_.mkdir()
    for name, body in STAND_INS.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{body}")
        (bin_ / name).chmod(0o755)
    requests = _requests()
    environment = dict(os.environ) | {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "GLOO_SOCKET_IFNAME": "lo",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": requests["nodes"],
        "SLURM_CPUS_PER_TASK": requests["cpus-per-task"],
    }
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )


def test_it_is_valid_bash_and_asks_for_one_task_per_node():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True, timeout=20)
    requests = _requests()
    assert requests["ntasks-per-node"] == "1"
    assert int(requests["nodes"]) == 2
    assert int(requests["cpus-per-task"]) >= 1
    assert re.fullmatch(r"\d\d:\d\d:\d\d", requests["time"])
    assert {"job-name", "output"} <= requests.keys()


def test_it_says_what_it_needs(tmp_path):
    done = _sbatch(tmp_path)
    assert done.returncode == 2
    assert "usage: sbatch train.sbatch PLAN RUN_DIR" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the loopback device is called lo on Linux")
def test_it_trains_on_two_nodes_in_a_folder_with_a_space(tmp_path, hf_dirs):
    task = make_task("a", write_examples(tmp_path / "a.jsonl", seed=0))
    model = load_model_spec(str(hf_dirs["llama"]))
    plan = make_plan(Workload(tasks=(task,)), model, partition=[["a"]])
    save_plan(plan, tmp_path / "plan.json")
    done = _sbatch(tmp_path, "plan.json", "a run", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert load_report(tmp_path / "a run" / "run.json").steps == 2
    assert done.stdout.count("effective tokens/s") >= 1
