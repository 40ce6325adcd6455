"""A device is a folder of data: one of one's own is priced like those that ship."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from muxtune.cluster import load_cluster
from muxtune.costs import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.costs.devices import device_names
from muxtune.costs.gpu import attention_kernel, device_peaks, load_gpu, peak_flops_per_s
from muxtune.graph.operators import Operator
from muxtune.model import PRESETS
from muxtune.support.errors import SpecError, UserError

SHIPPED = Path(str(files("muxtune.data"))) / "devices"
MODEL = PRESETS["llama2-7b"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a device that is an A100 by another name, whose data may be edited."""
    shutil.copytree(SHIPPED / "a100", tmp_path / "mine")
    monkeypatch.setenv("MUXTUNE_DEVICES", str(tmp_path))
    _forget()
    yield tmp_path / "mine"
    _forget()


def _forget():
    """Read anew what a process keeps of devices."""
    for kept in (load_gpu, device_peaks, attention_kernel):
        kept.cache_clear()


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_folder_alone_is_a_device(own):
    assert device_names() == ["a100", "a40", "h100", "mine"]
    mine, a100 = load_gpu("mine"), load_gpu("a100")
    assert mine.digest == a100.digest
    assert peak_flops_per_s("mine", "bfloat16") == 312e12
    costs = AnalyticCosts("mine", MODEL, interconnect_of(load_cluster("a100-2")))
    same = AnalyticCosts("a100", MODEL, interconnect_of(load_cluster("a100-2")))
    for op in (Operator("linear", (4096, 4096, 512)), Operator("attention", (4, 512))):
        assert costs.latency_s(op, "fwd") == same.latency_s(op, "fwd")


def test_all_of_it_is_read_from_there(own):
    def double(content):
        content["peaks"]["tensor_flops_per_s"] *= 2
        for rate in (*content["attention"]["forward"].values(), *content["attention"]["backward"].values()):
            rate["flops_per_s"] *= 2

    edit(own / "device.json", double)
    mine, a100 = load_gpu("mine"), load_gpu("a100")
    assert mine.attention.rate(128, "fwd").flops_per_s == 2 * a100.attention.rate(128, "fwd").flops_per_s
    assert mine.digest != a100.digest


def test_a_plan_needs_nothing_but_the_folder_and_a_cluster_that_names_it(own):
    shutil.copy(SHIPPED.parent / "links" / "nvlink-all-a100.json", own / "nvlink-all.json")
    cluster = load_cluster("a100-2")
    mine = cluster.model_copy(update={"device": cluster.device.model_copy(update={"name": "mine"})})
    costs = AnalyticCosts("mine", MODEL, interconnect_of(mine))
    same = AnalyticCosts("a100", MODEL, interconnect_of(cluster))
    op = Operator("all_reduce", (1 << 20, 2))
    assert costs.latency_s(op, "fwd") == same.latency_s(op, "fwd")
    assert costs.ref.device == "mine"
    (own / "nvlink-all.json").unlink()
    with pytest.raises(UserError, match="no coefficients of nvlink-all for device 'mine'"):
        interconnect_of(mine)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content["peaks"].update(tensor_flops_per_s=-1), "peaks.tensor_flops_per_s = -1"),
        (lambda content: content["attention"].update(forward={}), "attention.forward"),
        (lambda content: content.update(sms=108), "sms"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(own, change, said):
    edit(own / "device.json", change)
    with pytest.raises(SpecError, match=rf"{own}/device\.json: .*{said}"):
        load_gpu("mine")


def test_what_is_missing_is_named(own, tmp_path, monkeypatch):
    (own / "gemm.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*mine/gemm\.json: No such file"):
        load_gpu("mine")
    monkeypatch.setenv("MUXTUNE_DEVICES", str(tmp_path / "nothing"))
    with pytest.raises(SpecError, match=r"MUXTUNE_DEVICES = .*: expected a folder with a folder for each"):
        device_names()
