"""How often is peft beyond the bound that its own spread gives, by the number of draws?

A backbone like llama-tiny, with fewer layers, is first trained as a whole on the demonstration's texts, as
random weights are smoother than learned ones. Then, per seed and rate, a task trains on it alone in several
orders that differ in rounding alone. The last one stands for a run: it is judged as ``muxtune validate``
does, by the spread of one draw, of two, and so on. A correct run is as far from the first training as that
one, so each "beyond" is a false alarm.

    python -m benchmarks.spread [--seeds 20] [--steps 20] [--rates 1e-3 1e-2] [--pretrain 200] [--layers 4]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

import torch

from benchmarks.helpers.machine import machine_line
from experiments.demo_texts import write_demo_texts
from muxtune.model import ModelSpec, load_model_spec
from muxtune.peft import PeftSpec
from muxtune.peft.lora import LoraSpec
from muxtune.support.tables import format_table
from muxtune.tasks import DatasetSpec, PeftTask, TaskData, load_task_data
from runtime.backbone.hugging_face import load_hf_model
from runtime.reports.solo import train_solo
from runtime.reports.spread import DRAWS, Distance, bound_of, judge, largest
from runtime.reports.validate import distance_of

_PRETRAIN_RATE = 1e-3
_PRETRAIN_SEQUENCES = 8


def main() -> None:
    """Train, count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 1e-2])
    parser.add_argument("--pretrain", type=int, default=200, help="steps of the whole backbone; 0 for none")
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    preset = load_model_spec("llama-tiny").model_copy(update={"layers": arguments.layers})
    with tempfile.TemporaryDirectory() as name:
        texts = write_demo_texts(Path(name))
        dataset = DatasetSpec(path=next(iter(texts.values())))
        model = preset
        if arguments.pretrain:
            model, loss = _pretrained(preset, dataset, Path(name) / "backbone", arguments.pretrain)
            print(f"backbone: {arguments.pretrain} steps, loss {loss[0]:.2f} to {loss[-1]:.2f}")
        rows = []
        for rate in arguments.rates:
            per_seed = []
            for seed in range(arguments.seeds):
                task = _task(dataset, seed, rate, arguments.steps)
                per_seed.append(_distances(model, load_task_data(task, preset), arguments.steps))
                updates = ", ".join(f"{each.update:.1e}" for each in per_seed[-1])
                print(f"rate {rate:g}, seed {seed}: update of draws and of the run: {updates}", flush=True)
            rows.append(_row(model, rate, task.peft, per_seed))
    print(machine_line())
    header = ["rate", "seeds", "run's update, median", "largest", "undecided"]
    print(format_table([*header, *(f"beyond, draws {n + 1}" for n in range(DRAWS))], rows))


def _row(model: ModelSpec, rate: float, peft: PeftSpec, per_seed: list[list[Distance]]) -> list[str]:
    updates = [run.update or 0.0 for *_, run in per_seed]
    verdicts = [
        [judge(run, bound_of(model, peft, largest(draws[: n + 1]))) for *draws, run in per_seed]
        for n in range(DRAWS)
    ]
    cells = [f"{rate:g}", str(len(per_seed)), f"{median(updates):.1e}", f"{max(updates):.1e}"]
    return [*cells, str(verdicts[-1].count("undecided")), *(str(each.count("beyond")) for each in verdicts)]


def _distances(model: ModelSpec, data: TaskData, steps: int) -> list[Distance]:
    """Distances of as many draws as may be asked for, and of one more, from the task's own order."""
    solo = train_solo(model, data, steps)
    again = (train_solo(model, data, steps, draw=draw) for draw in range(1, DRAWS + 2))
    return [distance_of(each.losses, each.adapter, solo) for each in again]


def _task(dataset: DatasetSpec, seed: int, rate: float, steps: int) -> PeftTask:
    return PeftTask(
        id=f"seed-{seed}",
        peft=LoraSpec(method="lora", r=8, alpha=16, targets=("q_proj", "v_proj")),
        dataset=dataset,
        global_batch_size=8,
        micro_batch_size=4,
        max_length=64,
        learning_rate=rate,
        steps=steps,
        seed=seed,
        shuffle=True,
    )


def _pretrained(
    preset: ModelSpec, dataset: DatasetSpec, folder: Path, steps: int
) -> tuple[ModelSpec, list[float]]:
    """The backbone after training all of its weights, and the loss of each step."""
    task = _task(dataset, 0, _PRETRAIN_RATE, steps).model_copy(
        update={"global_batch_size": _PRETRAIN_SEQUENCES}
    )
    data = load_task_data(task, preset)
    backbone = load_hf_model(preset)
    backbone.requires_grad_(True)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=_PRETRAIN_RATE)
    losses = []
    for step in range(steps):
        rows = [torch.tensor(example.tokens.tolist()) for example in data.batch(step)]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        loss = backbone(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    backbone.save_pretrained(folder)
    return preset.model_copy(update={"source": str(folder)}), losses


if __name__ == "__main__":
    main()
