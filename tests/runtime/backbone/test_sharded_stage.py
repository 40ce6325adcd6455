"""Tensor-parallel ranks of a stage against the whole stage, as threads that sum through shared memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier

import pytest
import torch
from torch import Tensor

from muxtune.memory.weights import Sharding, adapter_parameters, backbone_bytes
from muxtune.model import check_sharding
from muxtune.support.errors import SpecError
from runtime.backbone.held_bytes import parameter_bytes
from runtime.backbone.hugging_face import load_hf_model
from runtime.backbone.stage import Stage
from runtime.data.batch import build_microbatch
from runtime.distributed.sharding import Shard, assemble
from runtime.distributed.tensor_parallel import split_nll
from runtime.tasks.gradients import squared_gradient_norms, sum_over_replicas, sum_over_shards
from runtime.tasks.tenant import Tenant
from tests.runtime.worlds import GPT2, LLAMA, OPT, lay_out, make_task, make_tenant

HEADS = {"heads": 4, "kv_heads": 4, "head_dim": 6}
SPECS = {
    "llama": LLAMA,  # 4 query heads on 2 of keys and values, ffn 40
    "llama-odd": LLAMA.model_copy(update={"ffn": 41, "vocab": 51}),
    "llama-one-kv": LLAMA.model_copy(update={"kv_heads": 1}),
    "gpt2": GPT2.model_copy(update=HEADS | {"ffn": 57, "vocab": 51}),
    "opt": OPT.model_copy(update=HEADS),
}
CASES = [(name, 2) for name in SPECS] + [("llama", 4), ("llama-one-kv", 4), ("gpt2", 4)]


@dataclass
class ThreadTeam:
    """A team of threads; all sums are added up in the order of the ranks."""

    ranks: int
    barrier: Barrier = field(init=False)
    slots: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = Barrier(self.ranks, timeout=60)
        self.slots = [torch.empty(0)] * self.ranks

    def member(self, index: int) -> Member:
        return Member(self, index)

    def run(self, play: Callable[[Shard], object]) -> list:
        """Play all ranks at once; their results."""
        with ThreadPoolExecutor(self.ranks) as pool:
            shards = [Shard(index, self.ranks, self.member(index)) for index in range(self.ranks)]
            return list(pool.map(play, shards))


@dataclass
class Member:
    team: ThreadTeam
    index: int

    def sum_(self, tensor: Tensor) -> None:
        self._combine(tensor, torch.add)

    def max_(self, tensor: Tensor) -> None:
        self._combine(tensor, torch.maximum)

    def _combine(self, tensor: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.team.slots[self.index] = tensor.clone()
        self.team.barrier.wait()
        result = self.team.slots[0]
        for other in self.team.slots[1:]:
            result = combine(result, other)
        self.team.barrier.wait()
        tensor.copy_(result)


def make_tenants(spec, folder):
    tasks = [(make_task("a", r=2), [3, 17, 5]), (make_task("b", r=5), [20, 2]), (make_task("c", r=8), [9])]
    return [make_tenant(spec, task, lengths, folder / task.id) for task, lengths in tasks]


def random_weights(spec):
    """Biases and norms, which transformers sets to 0 and 1, are moved, so that forgetting them shows."""
    weights = load_hf_model(spec)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in weights.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return weights


def play(spec, tenants, batch, weights, shard):
    """Losses, and the tenants with their gradients, of one rank that has all layers."""
    stage = Stage(spec, range(spec.layers), first=True, last=True, weights=weights, shard=shard)
    for tenant in tenants:
        stage.add_task(tenant.task, tenant.adapter)
    losses_K = stage.forward(batch, None)
    torch.autograd.backward(losses_K, torch.tensor([0.3, 1.0, 2.0], dtype=losses_K.dtype))
    ours = [Tenant(t.task, stage.task_parameters(t.task.id), stage.task_portions(t.task.id)) for t in tenants]
    if shard.team is not None:
        sum_over_shards(ours, shard.team)
    return losses_K.detach(), ours, parameter_bytes(stage)


def gradients(tenant):
    return {key: (tenant.portions[key], parameter.grad) for key, parameter in tenant.parameters.items()}


@pytest.mark.parametrize(("name", "tp"), CASES, ids=str)
def test_shards_of_a_stage_equal_the_whole_stage(name, tp, tmp_path):
    spec = SPECS[name]
    check_sharding(spec, tp)
    tenants = make_tenants(spec, tmp_path)
    batch = build_microbatch(
        lay_out(tenants, "pack"), [t.examples for t in tenants], task_ids=[t.task.id for t in tenants]
    )
    weights = random_weights(spec)
    whole_losses_K, whole, whole_bytes = play(spec, tenants, batch, weights, Shard())
    ranks = ThreadTeam(tp).run(lambda shard: play(spec, tenants, batch, weights, shard))

    for losses_K, own, _ in ranks:
        torch.testing.assert_close(losses_K, whole_losses_K, rtol=1e-12, atol=1e-12)
        assert torch.equal(losses_K, ranks[0][0])  # the same bits, so that all of them go on alike
        for tenant in own:
            assert all(p.grad.shape == p.shape for p in tenant.parameters.values())
    for i, tenant in enumerate(whole):
        parts = [gradients(own[i]) for _, own, _ in ranks]
        assembled = assemble(parts)
        assert assembled.keys() == tenant.parameters.keys()
        for key, parameter in tenant.parameters.items():
            # Llama's norms round to float32 even here, so sums in another order may differ by more.
            torch.testing.assert_close(assembled[key], parameter.grad, rtol=1e-7, atol=1e-9)
            for own_parts in parts:
                portion, part = own_parts[key]
                assert torch.equal(portion.take(assembled[key]), part), f"{key} differs between its holders"
        norms = sum(squared_gradient_norms([own[i]])[0] for _, own, _ in ranks)
        assert float(norms) == pytest.approx(float(squared_gradient_norms([tenant])[0]), rel=1e-9)

        saved = assemble(
            [
                {k: (t.portions[k], p.detach()) for k, p in t.parameters.items()}
                for t in (own[i] for _, own, _ in ranks)
            ]
        )
        assert all(torch.equal(saved[key], tensor) for key, tensor in tenants[i].adapter.items())
    bytes_ = [bytes_ for _, _, bytes_ in ranks]
    assert max(bytes_) < {2: 0.7, 4: 0.55}[tp] * whole_bytes


def test_bfloat16_shards_differ_by_rounding_only(tmp_path):
    spec = LLAMA.model_copy(update={"dtype": "bfloat16"})
    tenants = make_tenants(spec, tmp_path)
    batch = build_microbatch(
        lay_out(tenants, "pack"), [t.examples for t in tenants], task_ids=[t.task.id for t in tenants]
    )
    weights = random_weights(spec)
    whole_losses_K, whole, _ = play(spec, tenants, batch, weights, Shard())
    ranks = ThreadTeam(2).run(lambda shard: play(spec, tenants, batch, weights, shard))
    for losses_K, _, _ in ranks:
        assert losses_K.dtype == torch.float32
        torch.testing.assert_close(losses_K, whole_losses_K, rtol=0.01, atol=0)  # bfloat16 has 8 bits
    for i, tenant in enumerate(whole):
        assembled = assemble([gradients(own[i]) for _, own, _ in ranks])
        # Of the whole adapter: the gradients of queries and keys are so small that they are mostly rounding.
        expected = torch.cat([p.grad.flatten() for p in tenant.parameters.values()])
        found = torch.cat([assembled[key].flatten() for key in tenant.parameters])
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_shard_holds_the_bytes_that_the_planner_counts(name, tmp_path):
    # The planner counts biases as whole.
    spec = SPECS[name].model_copy(update={"attention_bias": False, "mlp_bias": False})
    stage = Stage(spec, range(4), first=True, last=True, weights=load_hf_model(spec), shard=Shard(0, 2))
    predicted = backbone_bytes(spec, 4, first=True, last=True, sharding=Sharding(tp=2))
    assert parameter_bytes(stage) == predicted
    (tenant, *_) = make_tenants(spec, tmp_path)
    stage.add_task(tenant.task, tenant.adapter)
    trained = sum(p.numel() for p in stage.task_parameters("a").values())
    assert trained == adapter_parameters(spec, 4, tenant.task.peft, Sharding(tp=2))


def test_the_loss_over_a_split_vocabulary_is_cross_entropy_even_of_huge_logits():
    torch.manual_seed(0)
    logits_NV = (torch.randn(7, 11, dtype=torch.float64) * 500).requires_grad_()
    ids_N, grad_N = torch.randint(11, (7,)), torch.randn(7, dtype=torch.float64)
    expected_N = torch.nn.functional.cross_entropy(logits_NV, ids_N, reduction="none")
    expected_N.backward(grad_N)

    def rank(shard: Shard) -> tuple[Tensor, Tensor]:
        start, stop = shard.span(11)
        own_NW = logits_NV.detach()[:, start:stop].clone().requires_grad_()
        nll_N = split_nll(own_NW, ids_N, start, shard.team)
        nll_N.backward(grad_N)
        return nll_N.detach(), own_NW.grad

    ranks = ThreadTeam(3).run(rank)
    for nll_N, _ in ranks:
        torch.testing.assert_close(nll_N, expected_N.detach(), rtol=1e-12, atol=1e-12)
    joined_NV = torch.cat([grad_NW for _, grad_NW in ranks], dim=1)
    torch.testing.assert_close(joined_NV, logits_NV.grad, rtol=1e-12, atol=1e-12)


def test_replicas_end_with_the_sum_and_one_without_sequences_counts_as_zero():
    def rank(shard: Shard) -> tuple[Tensor, Tensor]:
        tenant = Tenant(make_task("a"), {"w": torch.nn.Parameter(torch.zeros(2, 3))})
        if shard.index < 2:
            tenant.parameters["w"].grad = torch.full((3, 2), 1.0 + shard.index).t()  # as B's gradients lie
        flag_K = torch.tensor([float(shard.index == 1)])
        flag_K = sum_over_replicas([tenant], shard.team, flag_K)
        return tenant.parameters["w"].grad, flag_K

    for gradient, flag_K in ThreadTeam(3).run(rank):
        assert torch.equal(gradient, torch.full((2, 3), 3.0))
        assert gradient.dtype == torch.float32
        assert flag_K.tolist() == [1.0]


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({}, 3, r"parallelism\.tp = 3: expected a divisor of 4, the heads of llama-test"),
        ({"heads": 12, "kv_heads": 6}, 4, r"a divisor or a multiple of 6, the key and value heads"),
        ({"heads": 64, "kv_heads": 1, "ffn": 40}, 64, "at most 40, the smaller of MLP width and vocabulary"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(changes, tp, message):
    with pytest.raises(SpecError, match=message):
        check_sharding(LLAMA.model_copy(update=changes), tp)
