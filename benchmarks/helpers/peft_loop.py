"""The plain alternative: transformers and peft, one task after another, in one process with all threads.

python -m benchmarks.helpers.peft_loop [--steps 12] [--threads 2]      prints effective tokens/s
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from statistics import median

from experiments.workloads import mixed_workload
from muxtune.model import load_model_spec
from muxtune.tasks import load_task_data

WARM_UP_STEPS = 1
"""Left out: libraries choose and compile kernels there."""


def measure_peft_loop(steps: int, *, threads: int) -> float:
    """Effective tokens per second, in a process of its own, where no number of threads is chosen yet."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.helpers.peft_loop",
        f"--steps={steps}",
        f"--threads={threads}",
    ]
    # A number of threads that the caller has in its environment is not meant for this loop.
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(run.stdout)


def peft_loop_tokens_per_s(steps: int) -> float:
    """Effective tokens of one step of every task over the median seconds of these steps.

    Micro-batches are the tasks' own, padded to the longest of their sequences; loading and the adapters'
    initialization are not counted.
    """
    from runtime.reports.solo import train_solo  # noqa: PLC0415  # after the threads are set

    model = load_model_spec("llama-tiny")
    tokens = seconds = 0.0
    for task in mixed_workload(steps).tasks:
        data = load_task_data(task, model, None)
        result = train_solo(model, data, steps)
        counted = range(WARM_UP_STEPS, steps)
        tokens += sum(int(data.batch_lengths(step).sum()) for step in counted) / len(counted)
        seconds += median(result.step_s[WARM_UP_STEPS:])
    return tokens / seconds


def main() -> None:
    """Run and print one number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    import torch  # noqa: PLC0415  # seconds to import

    torch.set_num_threads(arguments.threads)
    print(peft_loop_tokens_per_s(arguments.steps))


if __name__ == "__main__":
    main()
