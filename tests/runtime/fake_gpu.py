"""Every operator of the suite on a device that only checks where tensors are: no tensor has any content.

    python -m tests.runtime.fake_gpu

A backend that torch knows by the name ``gpu``, without memory or kernels, with fake tensors on it: an
operation whose tensors are on different devices fails as it would on a GPU, and so does every read of a value
on the host, which would stop it there. Prints a line per operator: ``@ ok``, or its first failure. Runs in a
process of its own, because a backend cannot be taken back.
"""

from __future__ import annotations

import os
import sys
from itertools import product

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import runtime.operators
import runtime.ops.gemm
from muxtune.graph.operators import LINK_KINDS, Operator
from muxtune.model import PRESETS
from runtime.backbone.hugging_face import load_hf_model
from runtime.backbone.stage import Stage
from tests.kinds import MEASURED_KINDS

DIMS = {"in_features": 16, "out_features": 24, "r": 3, "layers": 2, "tensors": 4, "parameters": 100}
DEVICE = "gpu:0"
MODELS = ("llama-tiny", "gpt2-tiny")
DTYPES = ("float32", "bfloat16", "float64")


def _real_weights(spec):
    """Fake tensors cannot be cast in place, as transformers casts a model."""
    with unset_fake_temporarily():
        return load_hf_model(spec)


def _move(stage, device):
    """``Module.to``, which does not move fake parameters: each module's own are replaced instead."""
    for module in stage.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.to(device), requires_grad=parameter.requires_grad))
    return stage


def check_operator(op, spec, attention="grouped"):
    """Run both phases twice; the error of the first that fails."""
    runtime.ops.gemm._unread.cache_clear()  # made under another mode
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            forward, backward = runtime.operators.TorchOperators(attention).build(op, spec, DEVICE)
            for _ in range(2):
                results = [forward(), None if backward is None else backward()]
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    elsewhere = {str(t.device) for t in _tensors(results)} - {DEVICE}
    return f"its results are on {', '.join(sorted(elsewhere))}" if elsewhere else "ok"


def _tensors(results):
    if isinstance(results, Tensor):
        yield results
    elif isinstance(results, list | tuple):
        for each in results:
            yield from _tensors(each)


def main():
    """Check all; exit code 1 if one fails."""
    _setup_privateuseone_for_python_backend("gpu")
    runtime.operators.load_hf_model = _real_weights
    Stage.to = _move
    failed = False
    # A backend in Python has no sparse tensors.
    kinds = sorted(MEASURED_KINDS.keys() - LINK_KINDS - {"sparse"})
    for model, dtype, kind in product(MODELS, DTYPES, kinds):
        op = Operator(kind, tuple(DIMS.get(dim, 5) for dim in MEASURED_KINDS[kind]))
        said = check_operator(op, PRESETS[model].model_copy(update={"dtype": dtype}))
        print(f"{model} {dtype} {op} @ {said}")
        failed |= said != "ok"
    for name in ("loop", "varlen", "masked"):  # flex does not take a device of that name
        said = check_operator(Operator("attention", (5, 5)), PRESETS[MODELS[0]], name)
        print(f"{MODELS[0]} float32 attention({name}) @ {said}")
        failed |= said != "ok"
    sys.stdout.flush()
    os._exit(failed)  # torch may call the backend, which is in Python, while the interpreter shuts down


if __name__ == "__main__":
    main()
