"""IA3 as the domain sees it."""

from __future__ import annotations

import pytest

from muxtune.model import PRESETS
from muxtune.peft import EMBEDDING, METHODS, attachments, check_peft
from muxtune.peft.ia3 import Ia3Spec
from muxtune.support.errors import SpecError

LLAMA = PRESETS["llama-tiny"]
METHOD = METHODS.get("ia3")


def ia3(*targets: str, feedforward: tuple[str, ...] = (), **fields) -> Ia3Spec:
    return Ia3Spec(method="ia3", targets=targets, feedforward=feedforward, **fields)


def test_outputs_and_inputs_are_cut_where_the_linears_are():
    spec = ia3("k_proj", "o_proj", "up_proj", "down_proj", feedforward=("up_proj", "down_proj"))
    found = {each.site.path: each for each in attachments(spec, LLAMA.shard(2))}
    facts = {
        path: (each.reads, *((t.shape, t.sharded, t.dim, t.partial) for t in each.tensors))
        for path, each in found.items()
    }
    assert facts == {
        "self_attn.k_proj": ("output", ((64, 1), "outputs", 0, False)),
        "self_attn.o_proj": ("output", ((256, 1), "none", 0, False)),
        "mlp.up_proj": ("input", ((1, 256), "none", 1, True)),
        "mlp.down_proj": ("input", ((1, 344), "inputs", 1, False)),
    }
    assert found["mlp.up_proj"].dispatch is not None, "gate and up are one product"
    assert found["mlp.down_proj"].dispatch is None


def test_layers_that_are_alike_get_the_same_object():
    spec = ia3("k_proj", layers=(1, 3))
    assert METHOD.attachments(spec, LLAMA, 1) is METHOD.attachments(spec, LLAMA, 3)
    assert not METHOD.attachments(spec, LLAMA, 0)
    assert not METHOD.attachments(spec, LLAMA, EMBEDDING)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ia3("fc1"), r"peft\.targets = 'fc1': expected a linear of llama-tiny: q_proj"),
        (ia3("k_proj", layers=(8,)), r"peft\.layers = 8: expected layers from 0 to 7"),
        (ia3("k_proj", feedforward=("down_proj",)), r"peft\.feedforward = 'down_proj': expected one of its"),
        (ia3("all-linear", feedforward=("fc2",)), r"peft\.feedforward = 'fc2': expected a linear of"),
        (ia3("all-linear", feedforward=("all-linear",)), r"feedforward = 'all-linear': expected a linear of"),
    ],
)
def test_what_cannot_run_is_refused(spec, message):
    with pytest.raises(SpecError, match=message):
        check_peft(spec, LLAMA, "peft")


@pytest.mark.parametrize("quick", [True, False])
def test_its_grid_has_the_shapes_of_its_operators(quick):
    spec = ia3("all-linear", feedforward=("down_proj",))
    grid = {dims[:2] for dims in METHOD.kinds["ia3"].grid(LLAMA, quick)}
    assert {each.adapter.dims for each in attachments(spec, LLAMA)} <= grid
