"""SHiRA and diff pruning beside other tasks, against peft's SHiRA and plain torch, alone."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

from muxtune.peft import METHODS, attachments, check_peft
from muxtune.peft.diff import DiffSpec
from muxtune.peft.ia3 import Ia3Spec
from muxtune.peft.lora import LoraSpec
from muxtune.peft.shira import ShiraSpec
from muxtune.support.errors import SpecError
from runtime.backbone.hugging_face import load_hf_model
from runtime.peft import RUNTIME_METHODS
from runtime.peft.sparse import Pattern, draw_places, shared_pattern
from runtime.tasks.adapter_files import load_adapter, save_adapter
from tests.documents import load_page
from tests.runtime.backbone.test_sharded_stage import ThreadTeam
from tests.runtime.peft.training import (
    Result,
    alone,
    assemble,
    assert_same,
    make_tenants,
    random_weights,
    targets_of,
    together,
    train_together,
)
from tests.runtime.worlds import BACKBONES, GPT2, LLAMA, OPT, solo_losses

STEPS = {"llama": 20, "gpt2": 6, "opt": 6}
HEADS = {"heads": 4, "kv_heads": 4, "head_dim": 6}


def shira(r: int, *targets: str, layers=None) -> ShiraSpec:
    return ShiraSpec(method="shira", r=r, targets=targets or ("all-linear",), layers=layers)


def diff(density: float, *targets: str, layers=None) -> DiffSpec:
    return DiffSpec(method="diff", density=density, targets=targets or ("all-linear",), layers=layers)


def ia3(*targets: str) -> Ia3Spec:
    return Ia3Spec(method="ia3", targets=targets)


def lora(r: int) -> LoraSpec:
    return LoraSpec(method="lora", r=r, alpha=2.0 * r, targets=("all-linear",))


def copy_of(spec, weights):
    model = load_hf_model(spec).requires_grad_(False).eval()
    model.load_state_dict(weights.state_dict())
    return model


def solo_shira(spec, weights, tenant, steps) -> Result:
    """Peft's own training, configured by hand."""
    own: ShiraSpec = tenant.task.peft
    layers = range(spec.layers) if own.layers is None else own.layers
    paths = [
        f"{spec.layer_prefix}.{layer}.{linear.name}"
        for layer in layers
        for linear in spec.linears
        if own.targets == ("all-linear",) or linear.name in own.targets
    ]
    config = peft.ShiraConfig(r=own.r, random_seed=tenant.task.seed, target_modules=paths)
    model = get_peft_model(copy_of(spec, weights), config).eval()
    return alone(
        model,
        lambda: {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()},
        tenant,
        steps=steps,
    )


def solo_diff(spec, weights, tenant, steps) -> Result:
    """Whole weights with gradients, of which all but the entries' are set to zero."""
    model = copy_of(spec, weights)
    start = load_adapter(tenant.folder)
    places = {k.removesuffix(".indices"): tuple(t.long()) for k, t in start.items() if k.endswith("indices")}
    before = dict(weights.named_parameters())
    for key, place in places.items():
        weight = model.get_parameter(key).requires_grad_()
        mask = torch.zeros_like(weight).index_put(place, torch.ones((), dtype=weight.dtype))
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    return alone(
        model,
        lambda: {
            f"{key}.values": (model.get_parameter(key) - before[key]).detach()[place]
            for key, place in places.items()
        },
        tenant,
        steps=steps,
    )


@pytest.mark.parametrize("family", BACKBONES)
def test_losses_and_entries_equal_the_references_beside_other_tasks(family, tmp_path):
    spec = BACKBONES[family].model_copy(update={"layers": 2})
    weights = random_weights(spec)
    pefts = [diff(0.2), lora(3), diff(0.001, layers=(1,))]
    pefts += [shira(2), shira(3, *(linear.name for linear in spec.linears[:2]), layers=(1,))]
    tenants = make_tenants(spec, pefts if family != "gpt2" else pefts[:3], tmp_path)
    ours = together(spec, tenants, weights, steps=STEPS[family])
    for tenant, found in zip(tenants, ours, strict=True):
        if tenant.task.peft.method != "lora":
            solo = {"diff": solo_diff, "shira": solo_shira}[tenant.task.peft.method]
            assert_same(found, solo(spec, weights, tenant, STEPS[family]))


@pytest.mark.parametrize(
    ("spec", "tp"),
    [
        (LLAMA, 4),  # ranks share key and value heads
        (GPT2.model_copy(update=HEADS | {"ffn": 57, "vocab": 51}), 2),
        (OPT.model_copy(update=HEADS), 2),
    ],
    ids=["llama-4", "gpt2", "opt"],
)
def test_shards_equal_the_whole(spec, tp, tmp_path):
    spec = spec.model_copy(update={"layers": 2})
    weights = random_weights(spec)
    pefts = [diff(0.2), lora(3)] if spec.transposed_weights else [diff(0.2), lora(3), shira(2)]
    tenants = make_tenants(spec, pefts, tmp_path, max_grad_norm=0.05, weight_decay=0.1)
    whole = together(spec, tenants, weights, steps=4)
    ranks = ThreadTeam(tp).run(lambda shard: train_together(spec, tenants, weights, steps=4, shard=shard))
    for i, peft_ in enumerate(pefts):
        for losses, _ in ranks:
            assert_same(Result(losses[i], whole[i].adapter), whole[i])
        assert_same(Result(whole[i].losses, assemble([p[i] for _, p in ranks])), whole[i], 1e-8)
        if peft_.method != "lora":
            held = [sum(part.numel() for _, part in parts[i].values()) for _, parts in ranks]
            whole_size = sum(tensor.numel() for tensor in whole[i].adapter.values())
            assert max(held) < {2: 0.6, 4: 0.4}[tp] * whole_size, "entries are cut, not copied"


def test_a_saved_shira_loads_with_peft_and_gives_the_same_losses(tmp_path):
    spec = LLAMA.model_copy(update={"layers": 2})
    weights = random_weights(spec)
    tenants = make_tenants(spec, [shira(2, layers=(1,)), lora(3)], tmp_path)
    before = together(spec, tenants, weights, steps=3)
    save_adapter(tmp_path / "saved", before[0].adapter, like=tenants[0].folder)
    tenants[0] = replace(tenants[0], adapter=load_adapter(tmp_path / "saved"))
    after = together(spec, tenants, weights, steps=1)
    loaded = PeftModel.from_pretrained(copy_of(spec, weights), tmp_path / "saved").eval()
    with torch.no_grad():
        found = float(solo_losses(loaded, tenants[0].examples)) / targets_of(tenants[0])
    assert after[0].losses[0] == pytest.approx(found, rel=1e-10)
    assert after[0].losses[0] != pytest.approx(before[0].losses[0], rel=1e-6)


@pytest.mark.parametrize("spec", [LLAMA, GPT2], ids=["linear", "Conv1D"])
def test_a_saved_difference_is_added_to_a_plain_model_by_name(spec, tmp_path):
    spec = spec.model_copy(update={"layers": 2})
    weights = random_weights(spec)
    tenants = make_tenants(spec, [diff(0.2), lora(3)], tmp_path)
    before = together(spec, tenants, weights, steps=3)
    save_adapter(tmp_path / "saved", before[0].adapter, like=tenants[0].folder)
    tenants[0] = replace(tenants[0], adapter=load_adapter(tmp_path / "saved"))
    after = together(spec, tenants, weights, steps=1)
    names: dict[str, object] = {}
    exec(load_page("docs/vectors-and-entries.md").example("load_difference.py"), names)
    names["load_difference"](weights, tmp_path / "saved")
    with torch.no_grad():
        found = float(solo_losses(weights, tenants[0].examples)) / targets_of(tenants[0])
    assert after[0].losses[0] == pytest.approx(found, rel=1e-10)
    assert after[0].losses[0] != pytest.approx(before[0].losses[0], rel=1e-6)


@pytest.mark.parametrize(
    ("spec", "peft_"), [(GPT2, diff(0.3)), (OPT, diff(0.3)), (OPT, shira(2))], ids=["Conv1D", "diff", "shira"]
)
def test_the_reference_trains_as_the_runtime_does(spec, peft_, tmp_path):
    spec = spec.model_copy(update={"layers": 1})
    weights = random_weights(spec)
    tenants = make_tenants(spec, [peft_, lora(3)], tmp_path, weight_decay=0.1)
    ours = together(spec, tenants, weights, steps=3)
    reference = RUNTIME_METHODS.get(peft_.method).reference(weights, tenants[0].task, spec)
    start = load_adapter(tenants[0].folder)
    assert reference.state().keys() == start.keys()
    assert all(torch.equal(tensor, start[key]) for key, tensor in reference.state().items())
    assert_same(ours[0], alone(reference.module, reference.state, tenants[0], steps=3))


@pytest.mark.parametrize(
    "fields",
    [
        {"targets": ("all-linear",), "exclude_modules": ("fc1", "q_proj")},
        {"targets": r".*layers\.[02]\.self_attn\.(k|v)_proj"},
        {"targets": ("k_proj", "fc2"), "layers": (1, 3), "exclude_modules": r".*\.3\.fc2"},
    ],
)
@pytest.mark.parametrize("method", ["shira", "diff", "ia3"])
def test_targets_are_chosen_by_pefts_own_rules(method, fields, tmp_path):
    more = {"shira": {"r": 1}, "diff": {"density": 0.1}, "ia3": {}}[method]
    peft_ = METHODS.get(method).spec.model_validate({"method": method} | more | fields)
    check_peft(peft_, OPT, "peft")
    (tenant,) = make_tenants(OPT, [peft_], tmp_path)
    attached = [each for layer in range(OPT.layers) for each in attachments(peft_, OPT, layer)]
    assert len([key for key in tenant.adapter if "indices" not in key]) == len(attached) > 0
    reference = RUNTIME_METHODS.get(method).reference(load_hf_model(OPT), tenant.task, OPT)
    assert reference.state().keys() == tenant.adapter.keys()


@pytest.mark.parametrize("method", ["shira", "ia3"])
def test_a_task_starts_from_what_peft_has_saved(method, tmp_path):
    spec = OPT.model_copy(update={"layers": 1})
    if method == "shira":
        config = peft.ShiraConfig(r=2, random_seed=99, init_weights=False, target_modules=["k_proj"])
        fields = {"r": 2}
    else:
        config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False)
        fields = {}
    saved = get_peft_model(load_hf_model(spec), config)
    saved.save_pretrained(tmp_path / "saved")
    fields |= {"method": method, "targets": ("k_proj",), "init": tmp_path / "saved"}
    peft_ = METHODS.get(method).spec.model_validate(fields)
    check_peft(peft_, spec, "peft")
    (tenant,) = make_tenants(spec, [peft_], tmp_path)
    expected = get_peft_model_state_dict(saved)
    assert tenant.adapter.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tenant.adapter.items())
    reference = RUNTIME_METHODS.get(method).reference(load_hf_model(spec), tenant.task, spec)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in reference.state().items())
    ours = together(spec, [tenant], load_hf_model(spec), steps=1)
    found = float(solo_losses(reference.module, tenant.examples).detach()) / targets_of(tenant)
    assert ours[0].losses[0] == pytest.approx(found, rel=1e-10)
    other = {"shira": ia3("k_proj"), "ia3": shira(2, "k_proj")}[method]
    with pytest.raises(SpecError, match=r"peft\.init = .*: expected an adapter with peft_type"):
        check_peft(other.model_copy(update={"init": tmp_path / "saved"}), spec, "peft")


def test_layers_and_tasks_with_the_same_places_share_their_pattern():
    places_2N = draw_places(6, 5, 7, seed=3).long()
    device = torch.device("cpu")
    one = shared_pattern(places_2N, 6, 5, device)
    assert shared_pattern(places_2N.clone(), 6, 5, device) is one
    assert shared_pattern(draw_places(6, 5, 7, seed=4).long(), 6, 5, device) is not one


def test_entries_in_any_order_keep_their_places():
    torch.manual_seed(0)
    places_2N = draw_places(6, 5, 9, seed=3).long()[:, torch.randperm(9)]
    values_N, x_tI, grad_tO = torch.randn(9), torch.randn(4, 5), torch.randn(4, 6)
    dense = torch.zeros(6, 5).index_put(tuple(places_2N), values_N)
    pattern = Pattern(places_2N, 6, 5)
    torch.testing.assert_close(pattern.matrix(values_N).to_dense(), dense)
    torch.testing.assert_close(pattern.transposed(values_N).to_dense(), dense.t())
    expected_N = (grad_tO.t() @ x_tI)[tuple(places_2N)]
    torch.testing.assert_close(pattern.product_at_places(grad_tO.t(), x_tI.t()), expected_N)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda indices: indices + 1000, r"shira_indices = .*: expected places in self_attn\.q_proj, which"),
        (lambda indices: indices[:, 1:], r"shira_indices = \(2, .*: expected whole numbers of shape"),
        (lambda indices: indices.float(), r"expected whole numbers of shape"),
    ],
)
def test_places_that_cannot_be_are_refused(spoil, message, tmp_path):
    spec = LLAMA.model_copy(update={"layers": 1})
    tenants = make_tenants(spec, [shira(2, "q_proj"), lora(3)], tmp_path)
    spoiled = {k: spoil(t) if "indices" in k else t for k, t in tenants[0].adapter.items()}
    with pytest.raises(SpecError, match=message):
        train_together(
            spec, [replace(tenants[0], adapter=spoiled), tenants[1]], random_weights(spec), steps=1
        )
