"""Whatever decides results changes a digest, nothing else does, and large files are read once."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from muxtune.model import PRESETS, backbone_digest, digest, spec_from_hf
from muxtune.support.errors import SpecError
from tests.muxtune.model.folders import CONFIGS, LLAMA, split_weights, tensors_of, write_config, write_weights


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = write_config(tmp_path / "model", LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    write_weights(folder, tensors_of(spec_from_hf(folder)))
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    return folder


def digest_of(folder: Path):
    return backbone_digest(spec_from_hf(folder))


def test_a_preset_has_none():
    assert backbone_digest(PRESETS["llama-tiny"]) is None


@pytest.mark.parametrize("family", CONFIGS)
def test_a_folder_without_weights_and_tokenizer_has_the_digest_of_its_configuration(family, tmp_path):
    found = digest_of(write_config(tmp_path, CONFIGS[family]))
    assert (found.tokenizer, found.weights) == (None, None)
    assert len(found.config) == 64


def test_what_decides_nothing_changes_nothing(folder):
    before = digest_of(folder)
    content = json.loads((folder / "config.json").read_text())
    write_config(folder, dict(reversed(content.items())) | {"use_cache": False, "sliding_window": None})
    (folder / "README.md").write_text("read me")
    (folder / "generation_config.json").write_text("{}")
    os.utime(folder / "model.safetensors", (1, 1))
    after = digest_of(folder)
    assert after == before
    assert before.first_change(after) is None


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5},
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"max_position_embeddings": 128},
    ],
    ids=str,
)
def test_each_key_of_the_configuration_that_is_executed_changes_its_digest(change, folder):
    before = digest_of(folder)
    write_config(folder, json.loads((folder / "config.json").read_text()) | change)
    after = digest_of(folder)
    assert before.first_change(after) == "configuration (config.json)"
    assert (after.tokenizer, after.weights) == (before.tokenizer, before.weights)


@pytest.mark.parametrize("name", digest.TOKENIZER_FILES)
def test_each_file_of_a_tokenizer_changes_its_digest(name, folder):
    before = digest_of(folder)
    (folder / name).write_text('{"model": {"vocab": {"b": 0, "a": 1}}}')
    after = digest_of(folder)
    assert before.first_change(after) == "tokenizer"
    assert (after.config, after.weights) == (before.config, before.weights)


def test_weights_of_other_values_have_another_digest_even_if_sizes_and_times_are_the_same(folder):
    before = digest_of(folder)
    file = folder / "model.safetensors"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    tensors = {name: tensor * np.float32(1.5) for name, tensor in tensors_of(spec_from_hf(folder)).items()}
    write_weights(folder, tensors)
    os.utime(file, ns=times)
    after = digest_of(folder)
    assert before.first_change(after) == "weights"
    assert (after.config, after.tokenizer) == (before.config, before.tokenizer)


def test_one_of_several_files_is_enough(folder):
    tensors = tensors_of(spec_from_hf(folder))
    (folder / "model.safetensors").unlink()
    split_weights(folder, tensors)
    before = digest_of(folder)
    split_weights(folder, tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1})
    assert before.first_change(digest_of(folder)) == "weights"


def test_what_was_not_there_when_a_digest_was_taken_may_come(folder, tmp_path):
    bare = write_config(tmp_path / "bare", json.loads((folder / "config.json").read_text()))
    before = digest_of(bare)
    assert before.config == digest_of(folder).config
    assert before.first_change(digest_of(folder)) is None
    assert digest_of(folder).first_change(before) == "tokenizer"


@pytest.fixture
def large(tmp_path, monkeypatch) -> Path:
    """A file whose digest is worth keeping, in a cache of its own; reads are counted in ``reads``."""
    monkeypatch.setenv("MUXTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "_SETTLED_S", -1.0)
    digest._kept_digest.cache_clear()
    file = tmp_path / "large.bin"
    file.write_bytes(bytes(digest._KEPT_FROM_BYTES))
    return file


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    paths: list[Path] = []
    read = digest._read_digest
    monkeypatch.setattr(digest, "_read_digest", lambda path: paths.append(path) or read(path))
    return paths


def test_a_large_file_is_read_once_by_all_processes(large, reads):
    first = digest._file_digest(large)
    digest._kept_digest.cache_clear()  # as another process
    assert digest._file_digest(large) == first
    assert reads == [large]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"path": 1, "stamp": 2}', b'{"stamp": null}'])
def test_a_kept_digest_that_is_damaged_is_not_believed(content, large, reads):
    first = digest._file_digest(large)
    (kept,) = (large.parent / "cache" / "digests").iterdir()
    kept.write_bytes(content)
    digest._kept_digest.cache_clear()
    assert digest._file_digest(large) == first
    assert len(reads) == 2


def test_reading_for_minutes_is_said_once_per_folder(large, monkeypatch, caplog):
    digest._announce.cache_clear()
    digest._file_digest(large)
    assert caplog.text == ""
    monkeypatch.setattr(digest, "_ANNOUNCED_FROM_BYTES", 1 << 20)
    for name in ("one", "two", "one"):
        (large.parent / name).write_bytes(bytes(1 << 20))
        digest._file_digest(large.parent / name)
    assert caplog.text.count(f"reading the weights in {large.parent} for their digest, this once") == 1


def test_a_large_file_that_changed_is_read_again(large, reads):
    first = digest._file_digest(large)
    times = (large.stat().st_atime_ns, large.stat().st_mtime_ns)
    with large.open("r+b") as file:
        file.write(b"\1")
    os.utime(large, ns=times)  # the time of the change of its entry is another one all the same
    assert digest._file_digest(large) != first
    assert reads == [large, large]


def test_a_file_that_changed_just_now_is_not_kept(large, reads, monkeypatch):
    monkeypatch.setattr(digest, "_SETTLED_S", 3600.0)
    digest._file_digest(large)
    digest._file_digest(large)
    assert len(reads) == 2
    monkeypatch.setattr(time, "time", lambda: large.stat().st_ctime + 3601)
    digest._file_digest(large)
    digest._file_digest(large)
    assert len(reads) == 3


def test_a_cache_that_cannot_be_written_is_done_without(large, reads, monkeypatch):
    (large.parent / "cache").write_text("a file where the folder would be")
    first = digest._file_digest(large)
    digest._kept_digest.cache_clear()
    assert digest._file_digest(large) == first
    assert len(reads) == 2


def test_a_configuration_that_went_away_is_an_error_of_one_line(folder):
    spec = spec_from_hf(folder)
    (folder / "config.json").unlink()
    with pytest.raises(
        SpecError, match=r"model\.source = .*: expected a directory that can be read"
    ) as caught:
        backbone_digest(spec)
    assert "\n" not in str(caught.value)
