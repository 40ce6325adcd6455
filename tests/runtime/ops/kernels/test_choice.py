"""Which path a tensor takes, and that nothing of ours needs triton before a kernel runs."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from muxtune.support.errors import SpecError, UserError
from runtime.ops.kernels import choice, kernel_mode, kernels, use_triton

X = torch.ones(2, 2)


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """What was read or found once is found anew before and after each test."""
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.delenv(choice.INTERPRETER_VARIABLE, raising=False)
    for cached in (kernel_mode, choice._obstacle):
        cached.cache_clear()
    yield
    for cached in (kernel_mode, choice._obstacle):
        cached.cache_clear()


def gpu_tensor(dtype=torch.bfloat16, index=0):
    """What the choice looks at, on a machine without a GPU."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", index))


@pytest.mark.parametrize("mode", ["torch", "auto", None])
def test_tensors_of_the_cpu_go_through_torch(monkeypatch, mode):
    if mode:
        monkeypatch.setenv(choice.VARIABLE, mode)
    monkeypatch.setenv(choice.INTERPRETER_VARIABLE, "1")
    assert not use_triton(X)


def test_the_interpreter_has_to_be_asked_for(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "triton")
    with pytest.raises(UserError, match=r"only in triton's interpreter \(TRITON_INTERPRET=1\); expected"):
        use_triton(X)
    choice._obstacle.cache_clear()
    monkeypatch.setenv(choice.INTERPRETER_VARIABLE, "1")
    assert use_triton(X)
    assert use_triton(X.bfloat16())
    assert not use_triton(X.double())


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "cuda")
    with pytest.raises(SpecError, match=r"MUXTUNE_KERNELS = 'cuda': expected torch, triton or auto"):
        use_triton(X)


@pytest.mark.parametrize(
    ("capability", "taken"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((9, 0), True)]
)
def test_gpus_from_ampere_on_take_the_kernels(monkeypatch, capability, taken):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert use_triton(gpu_tensor()) == taken
    assert not use_triton(gpu_tensor(torch.float64))
    with kernels("torch"):
        assert not use_triton(gpu_tensor())
    if not taken:
        with kernels("triton"), pytest.raises(UserError, match=r"capability 7\.5, and the kernels need 8\.0"):
            use_triton(gpu_tensor())


def test_without_triton_a_gpu_uses_torch_unless_the_user_insists(monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    assert not use_triton(gpu_tensor())
    with kernels("triton"), pytest.raises(UserError, match="triton is not installed"):
        use_triton(gpu_tensor())


def test_an_override_ends_with_its_block(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "torch")
    monkeypatch.setenv(choice.INTERPRETER_VARIABLE, "1")
    with kernels("triton"):
        assert use_triton(X)
        with kernels("torch"):
            assert not use_triton(X)
        assert use_triton(X)
    assert not use_triton(X)


def test_nothing_imports_triton_until_a_kernel_runs():
    code = (
        "import sys; sys.modules['triton'] = None\n"  # importing it would raise
        "import torch, runtime.launch.run, runtime.ops.kernels.tables\n"
        "from runtime.ops.elementwise import rms_norm\n"
        "from runtime.peft.lora import LoraPair, lora_linear\n"
        "from muxtune.batches import Span\n"
        "x, a = torch.ones(4, 8), torch.ones(2, 8, requires_grad=True)\n"
        "y = lora_linear(x, torch.ones(8, 8), None, [Span(0, 0, 4)], [[LoraPair(a, a.t(), 1.0, (0, 8))]])\n"
        "rms_norm(y, torch.ones(8), 1e-5).sum().backward()\n"
        "print(a.grad is not None)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr
