from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from muxtune.support.errors import SpecError
from runtime.ops.elementwise import find_activation, find_gated_activation, rms_norm, rms_norm_reference

# In float32, 1 + tanh(x) in transformers' gelu_new keeps few digits where x is far below 0.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def with_gradient(function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    torch.manual_seed(1)
    return y, torch.autograd.grad(y, x, torch.randn_like(y))[0]


def assert_same(actual, expected, tolerance):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_rms_norm_is_bitwise_that_of_llama_where_float32_steps_are_inside(dtype):
    torch.manual_seed(0)
    module = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    torch.nn.init.normal_(module.weight)
    module.requires_grad_(False)
    x = torch.randn(10, 64).to(dtype)
    ours = with_gradient(lambda x: rms_norm(x, module.weight, 1e-5), x)
    for a, b in zip(ours, with_gradient(module, x), strict=True):
        assert torch.equal(a, b)


def test_fast_rms_norm_equals_its_reference():
    torch.manual_seed(0)
    x, weight = torch.randn(33, 256) * 3, torch.randn(256)
    actual = with_gradient(lambda x: rms_norm(x, weight, 1e-5), x)
    assert_same(actual, with_gradient(lambda x: rms_norm_reference(x, weight, 1e-5), x), 2e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu"])
def test_activations_equal_those_of_transformers(name, dtype):
    x = torch.cat((torch.linspace(-40, 40, 501), torch.tensor([0.0, 1e-4, -1e-4]))).to(dtype)[:, None]
    assert_same(with_gradient(find_activation(name), x), with_gradient(ACT2FN[name], x), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["silu", "swish", "gelu", "gelu_new"])
def test_gated_activations_equal_act_times_up(name, dtype):
    torch.manual_seed(0)
    x = torch.randn(9, 32).to(dtype) * 4

    def reference(x):
        gate, up = x.chunk(2, -1)
        return ACT2FN[name](gate) * up

    assert_same(with_gradient(find_gated_activation(name), x), with_gradient(reference, x), TOLERANCE[dtype])


def test_an_unknown_activation_is_named():
    with pytest.raises(SpecError, match=r"model\.activation = 'softsilu': expected an activation of"):
        find_activation("softsilu")
