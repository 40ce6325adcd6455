"""Names and shapes of a backbone's tensors are those of transformers' own model."""

import pytest
from transformers import AutoConfig

from muxtune.model import spec_from_hf
from muxtune.model.parameters import parameter_shapes
from tests.muxtune.model.configs import hf_model
from tests.muxtune.model.folders import GPT2, LLAMA, OPT, write_config


@pytest.mark.parametrize(
    "content",
    [
        LLAMA,
        LLAMA | {"attention_bias": True, "head_dim": 6},
        LLAMA | {"mlp_bias": True, "tie_word_embeddings": True},
        GPT2,
        GPT2 | {"n_inner": 20, "tie_word_embeddings": False},
        OPT,
        OPT | {"enable_bias": False, "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_names_and_shapes_are_those_of_transformers(content, tmp_path):
    spec = spec_from_hf(write_config(tmp_path, content))
    model = hf_model(AutoConfig.from_pretrained(tmp_path))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    assert parameter_shapes(spec) == expected
