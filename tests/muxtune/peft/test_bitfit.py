"""BitFit as the domain sees it."""

from __future__ import annotations

import pytest

from muxtune.model import PRESETS
from muxtune.peft import attachments, check_peft
from muxtune.peft.bitfit import BitFitSpec
from muxtune.support.errors import SpecError

BITFIT = BitFitSpec(method="bitfit")


def test_a_backbone_without_biases_is_refused_by_name():
    message = r"peft\.method = 'bitfit': expected another method: the linears of llama-tiny have no biases"
    with pytest.raises(SpecError, match=message):
        check_peft(BITFIT, PRESETS["llama-tiny"], "peft")
    check_peft(BITFIT, PRESETS["opt-tiny"], "peft")


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(SpecError, match=r"peft\.layers = 6: expected layers from 0 to 5 of gpt2-tiny"):
        check_peft(BitFitSpec(method="bitfit", layers=(6,)), PRESETS["gpt2-tiny"], "peft")


def test_biases_behind_a_sum_have_their_gradient_on_one_rank():
    found = {each.site.path: each.tensors[0] for each in attachments(BITFIT, PRESETS["gpt2-tiny"].shard(2))}
    facts = {path: (t.shape, t.sharded, t.partial) for path, t in found.items()}
    assert facts == {
        "attn.c_attn": ((384,), "outputs", False),
        "attn.c_proj": ((256,), "none", True),
        "mlp.c_fc": ((512,), "outputs", False),
        "mlp.c_proj": ((256,), "none", True),
    }


def test_only_linears_with_a_bias_are_trained():
    model = PRESETS["llama-tiny"].model_copy(update={"attention_bias": True})
    assert {each.site.path.split(".")[0] for each in attachments(BITFIT, model)} == {"self_attn"}
