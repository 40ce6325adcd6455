"""No door for code of others: not of a model's folder, not of the current directory."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from muxtune.model import load_model_spec
from muxtune.support.errors import SpecError
from muxtune.tasks import load_tokenizer
from runtime.backbone.hugging_face import load_hf_model
from tests.helpers import make_hf_model

ROOT = Path(__file__).parents[1]
ROOMS = ("muxtune", "profiler", "sim", "runtime", "experiments")


def _calls() -> Iterator[tuple[str, ast.Call]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def _keyword(call: ast.Call, name: str) -> object:
    values = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def test_every_call_that_reads_a_models_folder_says_that_its_code_is_not_trusted():
    readers = {"from_pretrained", "from_config"}
    found = [(at, c) for at, c in _calls() if isinstance(c.func, ast.Attribute) and c.func.attr in readers]
    assert len(found) >= 5
    assert [at for at, call in found if _keyword(call, "trust_remote_code") is not False] == []


def test_every_call_that_reads_torchs_own_files_runs_no_code_in_them():
    found = [(at, c) for at, c in _calls() if ast.unparse(c.func) == "torch.load"]
    assert found
    assert [at for at, call in found if _keyword(call, "weights_only") is not True] == []


def test_every_python_that_is_started_keeps_the_current_directory_out():
    commands = [
        (path.relative_to(ROOT), node.elts)
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable"
    ]
    assert len(commands) >= 3
    flags = [(str(path), ast.literal_eval(elements[1])) for path, elements in commands]
    assert [entry for entry in flags if not entry[1].startswith("-P")] == []


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A directory that asks for code of its own in every way that transformers knows; stdin says yes."""
    folder = make_hf_model(tmp_path / "model", "llama")
    mark = f"open({str(tmp_path / 'executed')!r}, 'a').write('x')\n"
    for name in ("mine.py", "modeling_mine.py", "tokenization_mine.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(mark)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    yield folder
    assert not (tmp_path / "executed").exists()


def _set(folder: Path, file: str, **keys: object) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | keys))


@pytest.mark.parametrize("known", [True, False], ids=["a type that transformers knows", "its own type"])
@pytest.mark.parametrize(
    "auto_map",
    [
        {"AutoConfig": "mine.MineConfig"},
        {"AutoModelForCausalLM": "modeling_mine.Mine"},
        {"AutoModelForCausalLM": "somebody/repository--modeling_mine.Mine"},
    ],
    ids=str,
)
def test_a_model_that_its_folders_code_would_make_is_refused(auto_map, known, folder):
    _set(folder, "config.json", auto_map=auto_map, **({} if known else {"model_type": "mine"}))
    with pytest.raises(
        SpecError, match=r"config\.json: auto_map = .*: expected none: a folder's own code is"
    ):
        load_model_spec(str(folder))


def test_a_type_that_nobody_knows_is_refused_without_a_question(folder):
    _set(folder, "config.json", model_type="mine")
    with pytest.raises(SpecError, match="expected a Hugging Face configuration"):
        load_model_spec(str(folder))


def test_a_tokenizer_that_its_folders_code_would_make_is_refused(folder):
    _set(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_mine.Mine", None]})
    spec = load_model_spec(str(folder))
    with pytest.raises(SpecError, match=r"tokenizer_config\.json: auto_map = .*: expected none"):
        load_tokenizer(spec)


def test_code_that_nothing_asks_for_is_left_alone(folder):
    spec = load_model_spec(str(folder))
    load_hf_model(spec)
    load_tokenizer(spec)


def test_code_in_pickled_weights_is_not_run(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (eval, (f"open({str(tmp_path / 'executed')!r}, 'w')",))

    torch.save(load_file(folder / "model.safetensors") | {"evil": Evil()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SpecError, match=r"model\.source = .*: expected a directory with readable weights"):
        load_hf_model(load_model_spec(str(folder)))
