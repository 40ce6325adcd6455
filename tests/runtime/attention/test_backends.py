"""Which backend runs where, and what is said of one that does not."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from muxtune.batches import Segment
from muxtune.graph.attention_backends import DEFAULT_ATTENTION, AttentionName
from muxtune.model import PRESETS
from muxtune.support.errors import SpecError
from runtime.attention import (
    BACKENDS,
    AttentionSite,
    attention_site,
    build_attention_plan,
    causal_attention,
    check_attention,
    refusals,
)
from tests.runtime.attention.streams import rope_tables


def site(device="cuda", dtype=torch.bfloat16, head_dim=128, capability=(9, 0)):
    return AttentionSite(device=device, dtype=dtype, head_dim=head_dim, capability=capability)


def running(where):
    return {name for name, needs in refusals(where).items() if needs is None}


def test_every_name_has_a_backend():
    assert set(BACKENDS) == set(get_args(AttentionName))
    assert all(name == backend.name for name, backend in BACKENDS.items())
    assert BACKENDS[DEFAULT_ATTENTION].isolates


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 64])
def test_a_cpu_trains_with_those_of_every_device(dtype, head_dim):
    assert running(site("cpu", dtype, head_dim, None)) == {"grouped", "loop", "masked"}


@pytest.mark.parametrize(
    ("change", "missing", "needs"),
    [
        ({}, set(), ""),
        ({"capability": None}, set(), ""),
        ({"dtype": torch.float32}, {"varlen"}, "float16 or bfloat16"),
        ({"dtype": torch.float64}, {"varlen", "flex"}, "float32, float16 or bfloat16"),
        ({"head_dim": 84}, {"varlen"}, "multiple of 8, and 256 at most"),
        ({"head_dim": 264}, {"varlen"}, "multiple of 8, and 256 at most"),
        ({"head_dim": 8}, {"flex"}, "width 16 or more"),
        ({"capability": (7, 5)}, {"varlen"}, "compute capability 8.0"),
    ],
)
def test_a_gpu_trains_with_all_whose_kernels_fit(change, missing, needs):
    where = site(**change)
    assert running(where) == set(BACKENDS) - missing
    said = [refusals(where)[name] for name in missing]
    assert None not in said
    assert not missing or any(needs in each for each in said)


@pytest.mark.parametrize(
    ("name", "needs"), [("varlen", "a CUDA device"), ("flex", "a CUDA device: torch has no backward")]
)
def test_a_refusal_names_the_field_what_it_needs_and_what_runs(name, needs):
    with pytest.raises(
        SpecError, match=rf"execution\.attention = '{name}': .*grouped, loop, masked.*{needs}"
    ):
        check_attention(name, site("cpu", torch.float32, 64, None))
    check_attention("masked", site("cpu", torch.float32, 64, None))


def test_the_site_of_a_backbone_on_a_cpu():
    model = PRESETS["gpt2-tiny"].model_copy(update={"dtype": "bfloat16"})
    expected = AttentionSite(device="cpu", dtype=torch.bfloat16, head_dim=model.head_dim)
    assert attention_site(model, "cpu") == expected


@pytest.mark.parametrize("name", ["varlen", "grouped", "loop", "masked"])
@pytest.mark.parametrize("tokens", [21, 24], ids=["whole", "holes"])
def test_torch_takes_the_arguments(name, tokens):
    """Shapes, dtypes and names, on the meta device: nothing is computed, the real operator is asked."""
    segments = [Segment(0, 0, 0, 8, 8), Segment(0, 1, 8, 13, 13)]
    plan = build_attention_plan(segments, tokens, "meta", backend=name)
    qkv = torch.empty(tokens, 8 * 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    rope = rope_tables(torch.bfloat16, width=16)
    tables = type(rope)(*(table.to("meta") for table in (rope.cos, rope.sin, rope.inverse_sin)))
    out = causal_attention(qkv, plan, 4, 2, tables)
    assert out.shape == (tokens, 4 * 16)
    (gradient,) = torch.autograd.grad(out, qkv, torch.empty_like(out))
    assert gradient.shape == qkv.shape
