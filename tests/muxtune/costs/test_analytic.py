"""Operators on GPUs that are not here: every kind has a price, and the prices are those of known machines."""

import json
import pickle
from contextlib import nullcontext

import pytest

from muxtune.cluster import LinkSpec, load_cluster
from muxtune.costs.adapters import Pair, grouped_seconds
from muxtune.costs.analytic import FACTOR_BYTES, HOST_LAUNCH_S, AnalyticCosts
from muxtune.costs.collectives import Interconnect, interconnect_of
from muxtune.costs.compose import MicrobatchWork
from muxtune.costs.gpu import device_peaks
from muxtune.costs.links import load_link
from muxtune.graph.operators import FWD_ONLY, PHASES, Operator
from muxtune.model import ModelSpec, load_model_spec
from muxtune.peft.lora import LoraSpec
from muxtune.support.errors import SpecError, UserError
from tests.kinds import MEASURED_KINDS
from tests.muxtune.costs.actions import layer_operators

LLAMA_7B = ModelSpec(
    name="llama-7b-shapes",
    family="llama",
    source="preset",
    layers=32,
    hidden=4096,
    ffn=11008,
    heads=32,
    kv_heads=32,
    head_dim=128,
    vocab=32000,
    max_positions=4096,
    activation="silu",
    norm_eps=1e-5,
    dtype="bfloat16",
)
LINK = LinkSpec(name="own", latency_s=1e-5, bandwidth_bytes_per_s=5e10)
DEVICES = ("a40", "a100", "h100")
FREE_ON_A_GPU = {"feed", "message"}


def links(nodes=1, ranks=8):
    cluster = load_cluster("a100-8")
    between = LinkSpec(name="network", latency_s=2e-5, bandwidth_bytes_per_s=1e10) if nodes > 1 else None
    changes = {"within_node": LINK, "between_nodes": between, "nodes": nodes, "ranks": ranks}
    return interconnect_of(cluster.model_copy(update=changes))


def costs(device="a100", model=LLAMA_7B, **options):
    return AnalyticCosts(device, model, links(), **options)


def work(tokens, pefts=0, length=512):
    lora = LoraSpec(method="lora", r=16, alpha=16, targets=("all-linear",))
    return MicrobatchWork(
        tokens=tokens,
        task_tokens=(tokens // max(pefts, 1),) * pefts,
        pefts=(lora,) * pefts,
        attention=((1.0, max(tokens // length, 1), min(tokens, length)),),
        targets=0.0,
    )


def layer_s(prices, tokens, phase="fwd", **options):
    weighted = layer_operators(prices.model, work(tokens, **options), phase)
    return sum(prices.latency_s(op, phase) * count for op, count in weighted)


def mfu(device, tokens):
    weights = sum(linear.in_features * linear.out_features for linear in LLAMA_7B.linears)
    flops = 2 * weights * tokens + 4 * LLAMA_7B.hidden * tokens * 512 / 2
    return flops / layer_s(costs(device), tokens) / device_peaks(device).tensor_flops_per_s


EXAMPLES = {
    "linear": (4096, 11008, 1024),
    "lora": (4096, 4096, 16, 1024),
    "bottleneck": (4096, 64, 1024),
    "dropout": (4096, 1024),
    "bias": (4096, 1024),
    "ia3": (4096, 4096, 1024),
    "sparse": (4096, 4096, 32_768, 1024),
    "prefix": (2048, 20, 1024),
    "prompt": (4096, 20, 1024),
    "lora_magnitude": (4096, 1024),
    "lora_dropped_dora": (4096, 4096, 16, 1024),
    "lora_bias": (4096, 1024),
    "attention": (4, 256),
    "head": (256,),
    "optimizer": (448, 40_000_000),
    "all_reduce": (1 << 24, 4),
    "all_gather": (1 << 24, 4),
    "reduce_scatter": (1 << 24, 4),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "model", [LLAMA_7B, load_model_spec("gpt2-tiny", dtype="bfloat16")], ids=lambda m: m.name
)
@pytest.mark.parametrize("kind", sorted(set(MEASURED_KINDS) - {"stage"}))
def test_every_kind_is_priced_in_every_phase(device, model, kind):
    prices = costs(device, model)
    op = Operator(kind, EXAMPLES.get(kind, (1024,)))
    for phase in PHASES[:1] if kind in FWD_ONLY else PHASES:
        seconds = prices.latency_s(op, phase)
        assert isinstance(seconds, float)
        if kind in FREE_ON_A_GPU:
            assert seconds == 0.0
        else:
            assert 1e-6 < seconds < 0.1
        assert prices.latency_s(op, phase) == seconds
    assert prices.latency_s(Operator(kind, (0,) * len(op.dims)), "fwd") == 0.0


@pytest.mark.parametrize("device", DEVICES)
def test_a_7b_forward_of_4096_tokens_uses_40_to_75_percent_of_the_peak(device):
    assert 0.40 < mfu(device, 4096) < 0.75


@pytest.mark.parametrize("device", DEVICES)
def test_doubling_many_tokens_doubles_the_time(device):
    prices = costs(device)
    for phase in PHASES:
        ratio = layer_s(prices, 16384, phase) / layer_s(prices, 8192, phase)
        assert ratio == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("device", DEVICES)
def test_few_tokens_are_bound_by_the_weights_and_by_launches(device):
    prices = costs(device)
    assert layer_s(prices, 32, length=32) / layer_s(prices, 16, length=16) < 1.15
    assert mfu(device, 64) < 0.35
    tiny = costs(device, load_model_spec("llama-tiny", dtype="bfloat16"), host_launch_s=20e-6)
    kernels = 4 + 2 + 2 * 2 + 1  # products, rotation and attention, norms with additions, activation
    assert layer_s(tiny, 64, length=64) == pytest.approx(kernels * 20e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_the_backward_of_a_frozen_layer_costs_about_its_forward(device):
    prices = costs(device)
    for tokens in (1024, 4096):
        assert 0.95 < layer_s(prices, tokens, "bwd") / layer_s(prices, tokens) < 1.3
    op = Operator("linear", (4096, 11008, 4096))
    swapped = Operator("linear", (11008, 4096, 4096))
    assert prices.latency_s(op, "bwd") == prices.latency_s(swapped, "fwd")


def test_faster_devices_are_faster():
    seconds = [layer_s(costs(device), 4096, phase) for phase in PHASES for device in DEVICES]
    assert seconds[0] > seconds[1] > seconds[2]
    assert seconds[3] > seconds[4] > seconds[5]


def test_adapters_are_a_part_of_the_time_and_have_both_gradients():
    prices = costs()
    bare, adapted = (layer_s(prices, 4096, pefts=n) for n in (0, 4))
    assert 1.02 < adapted / bare < 1.4
    op = Operator("lora", (4096, 4096, 16, 4096))
    assert 1.3 < prices.latency_s(op, "bwd") / prices.latency_s(op, "fwd") < 3


def test_separate_adapters_are_operations_of_torch():
    op = Operator("lora", (4096, 4096, 16, 512))
    grouped, torch = costs(), costs(adapter_kernels="torch")
    assert grouped.with_adapters("grouped") is grouped
    for phase in PHASES:
        assert grouped.with_adapters("separate").latency_s(op, phase) == torch.latency_s(op, phase)
    assert grouped.with_adapters("separate").ref == torch.ref


def test_grouped_kernels_are_faster_than_operations_of_torch():
    for tokens in (128, 1024, 8192):
        op = Operator("lora", (4096, 4096, 16, tokens))
        for phase in PHASES:
            grouped = costs(adapter_kernels="grouped").latency_s(op, phase)
            assert grouped < costs(adapter_kernels="torch").latency_s(op, phase)


def test_launches_of_an_adapter_hide_behind_its_product():
    slow_host = costs(host_launch_s=50e-6)
    op = Operator("lora", (4096, 4096, 16, 8192))
    pair = Pair(in_features=4096, out_features=4096, r=16, tokens=8192)
    alone_s = grouped_seconds(slow_host.gpu, (pair,), "fwd", element_bytes=2, factor_bytes=FACTOR_BYTES)
    assert slow_host.latency_s(op, "fwd") == alone_s
    assert slow_host.latency_s(Operator("lora", (64, 64, 4, 16)), "fwd") == pytest.approx(150e-6)


def test_the_head_is_a_product_and_passes_over_the_logits():
    prices = costs()
    seconds = prices.latency_s(Operator("head", (4096,)), "fwd")
    product = prices.latency_s(Operator("linear", (4096, 32000, 4096)), "fwd")
    passes = 4096 * 32000 * (2 + 4 + 4 + 4) / prices.gpu.pointwise.dram_bytes_per_s
    rows = 4096 * 4096 * prices.gpu.pointwise.gather_s
    assert seconds == pytest.approx(product + passes + rows, rel=0.03)


def test_the_optimizer_moves_28_bytes_per_parameter():
    prices = costs()
    seconds = prices.latency_s(Operator("optimizer", (448, 40_000_000)), "fwd")
    assert seconds == pytest.approx(28 * 40e6 / prices.gpu.pointwise.dram_bytes_per_s, rel=0.05)
    many = prices.latency_s(Operator("optimizer", (3600, 3600)), "fwd")
    assert many == pytest.approx(101 * HOST_LAUNCH_S, rel=0.01)


def test_transfers_are_those_of_the_interconnect():
    prices = costs()
    bytes_ = 1 << 25
    assert prices.latency_s(Operator("p2p", (bytes_,)), "fwd") == links().send_recv_s(float(bytes_))
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        expected = getattr(links(), f"{kind}_s")(float(bytes_), 4)
        assert prices.latency_s(Operator(kind, (bytes_, 4)), "fwd") == expected


def test_a_pipeline_over_nodes_waits_for_the_network():
    over_nodes = AnalyticCosts("a100", LLAMA_7B, links(nodes=2, ranks=16))
    op = Operator("p2p", (1 << 25,))
    assert over_nodes.latency_s(op, "fwd") > 3 * costs().latency_s(op, "fwd")


def test_float32_has_no_tensor_cores_and_other_dtypes_no_price():
    full = costs(model=LLAMA_7B.model_copy(update={"dtype": "float32"}))
    op = Operator("linear", (4096, 4096, 8192))
    assert 8 < full.latency_s(op, "fwd") / costs().latency_s(op, "fwd") < 16
    thin = Operator("linear", (4096, 4096, 1))  # the weights are read, whatever is computed
    assert 1.5 < full.latency_s(thin, "fwd") / costs().latency_s(thin, "fwd") < 2.1
    for kind, dims in (("norm", (4096,)), ("activation", (4096,)), ("attention", (8, 512)), ("head", (512,))):
        assert full.latency_s(Operator(kind, dims), "fwd") > costs().latency_s(Operator(kind, dims), "fwd")
    with pytest.raises(SpecError, match="dtype = 'float64': expected bfloat16 or float32 on a100"):
        costs(model=LLAMA_7B.model_copy(update={"dtype": "float64"}))


def test_an_unknown_device_is_refused():
    with pytest.raises(UserError, match="no device with coefficients named 'a10'"):
        costs("a10")


def test_identity_follows_whatever_prices_follow():
    first = costs().ref
    assert first == costs().ref
    assert first.device == "a100"
    assert first.profile_id == f"analytic-a100-{first.digest[:12]}"
    others = [
        costs("h100"),
        costs(adapter_kernels="torch"),
        costs(host_launch_s=0.0),
        costs(model=LLAMA_7B.model_copy(update={"dtype": "float32"})),
        AnalyticCosts("a100", LLAMA_7B, links(nodes=2, ranks=16)),
    ]
    assert len({first.digest, *(other.ref.digest for other in others)}) == 1 + len(others)
    json.dumps(first.model_dump())


@pytest.mark.parametrize("changed", ["within", "beyond_pairs", "between"])
def test_identity_follows_every_link_of_a_cluster(changed):
    cluster = load_cluster("testbed-b").model_copy(update={"nodes": 4})
    names = {"within": "nvlink-pair", "beyond_pairs": "pcie", "between": "infiniband"}

    def digest(other=None):
        links = {role: load_link(name, "h100" if role == other else "a40") for role, name in names.items()}
        return AnalyticCosts("a40", LLAMA_7B, Interconnect(cluster, **links)).ref.digest

    assert digest() == digest()
    assert digest(changed) != digest()


def test_it_is_a_cost_model_that_workers_may_share():
    prices = costs()
    op = Operator("linear", (4096, 4096, 256))
    with prices.exploring():
        seconds = prices.latency_s(op, "fwd")
    assert isinstance(prices.exploring(), nullcontext)
    assert prices.action_s(0.25, "bwd") == 0.25
    assert pickle.loads(pickle.dumps(prices)).latency_s(op, "fwd") == seconds


def test_composed_operators_are_not_priced_one_by_one():
    with pytest.raises(ValueError, match="composed of the others"):
        costs().latency_s(Operator("stage", (1, 1, 8, 4, 64)), "fwd")
