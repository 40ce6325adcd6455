"""Every site of a layer can be adapted: a small method at each equals hooks on the model of transformers."""

# t tokens, I features in, O features out, D hidden size, P rows or keys in front

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import pytest
import torch
from transformers import DynamicCache

from muxtune.operators import OperatorKind, OperatorShape, OperatorWork
from muxtune.peft import (
    EMBEDDING,
    METHODS,
    Attachment,
    Extra,
    PeftSpec,
    TrainedTensor,
    embedding_site,
    extra,
    site_of,
)
from muxtune.tasks import PeftTask
from runtime.backbone.hugging_face import load_hf_model
from runtime.backbone.stage import Stage
from runtime.data.batch import build_microbatch
from runtime.peft import RUNTIME_METHODS, FilePart, TaskAdapter
from tests.runtime.worlds import BACKBONES, Tenant, lay_out, make_task, make_tenant

FRONT = 2


class HookSpec(PeftSpec):
    method: Literal["hook"]
    site: Literal["embedding", "linear", "block", "keys_values"]
    path: str
    does: Literal["rewrite", "update", "scale", "extend"]


class Hook:
    summary = "one trained vector at one site"
    spec = HookSpec
    kinds: ClassVar = {
        "hook": OperatorKind(
            dims=("features", "tokens"), work=lambda d, p, m: OperatorWork(d[0] * d[1], 8.0 * d[0] * d[1], 1)
        )
    }

    def check(self, spec, model, where):
        return None

    def attachments(self, spec, model, layer):
        if (layer == EMBEDDING) != (spec.site == "embedding"):
            return ()
        site = embedding_site(model) if layer == EMBEDDING else site_of(model, spec.site, spec.path)
        width = site.in_features if spec.does == "rewrite" else site.out_features
        tensor = TrainedTensor("w", (width,) if spec.does != "extend" else (FRONT, width))
        return (
            Attachment(
                site=site,
                reads="input" if spec.does in {"rewrite", "update"} else "output",
                rewrites_input=spec.does == "rewrite",
                tensors=(tensor,),
                adapter=OperatorShape("hook", (width,)),
            ),
        )

    def extra(self, spec):
        return Extra(keys=FRONT if spec.site == "keys_values" else 0)


class HookAdapter(TaskAdapter):
    def __init__(self, w):
        self.w = w

    def dispatch(self, x_tI):
        return x_tI * (1 + self.w)

    def update(self, x_tI, keys_t):
        return x_tI.sum(-1, keepdim=True) * self.w

    def aggregate(self, y_tO, x_tI, keys_t):
        return y_tO * (1 + self.w)

    def embed(self, hidden_tD, positions_t):
        return torch.where(
            (positions_t < FRONT)[:, None], self.w[positions_t.clamp(max=FRONT - 1)], hidden_tD
        )

    def keys_values(self):
        return self.w


class HookRuntime:
    def attach(self, each, tensors, frozen):
        return HookAdapter(tensors["w"])

    def adder(self, adapters, keys_T):
        return None

    def file_part(self, each, tensor, layer, model):
        return FilePart(f"{layer}.w")

    def initial(self, skeleton, task, model, folder):
        raise NotImplementedError

    def reference(self, backbone, task, model):
        raise NotImplementedError

    def builders(self):
        return {}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    if "hook" not in METHODS._entries:
        METHODS.add("hook", Hook())
        RUNTIME_METHODS.add("hook", HookRuntime())
    yield
    for registry in (METHODS, RUNTIME_METHODS):
        registry._entries.pop("hook")


def hooked_loss(spec, peft, weights, examples) -> torch.Tensor:
    """Loss of the examples by transformers' own model, with hooks that do what the method does."""
    model = load_hf_model(spec).eval()
    layers = model.model.layers
    modules = {
        "linear": lambda layer: layer.get_submodule(peft.path),
        "block": lambda layer: layer.mlp if peft.path == "mlp" else layer.self_attn,
    }
    if peft.site == "embedding":
        (w,) = weights.values()
        model.model.embed_tokens.register_forward_hook(
            lambda m, x, y: torch.cat([w.expand(len(y), *w.shape), y[:, FRONT:]], 1)
        )
    for number, layer in enumerate(layers if peft.site in modules else ()):
        w, module = weights[f"{number}.w"], modules[peft.site](layer)
        if peft.does == "rewrite":
            module.register_forward_pre_hook(lambda m, x, w=w: (x[0] * (1 + w), *x[1:]))
        elif peft.does == "update":
            module.register_forward_hook(lambda m, x, y, w=w: y + x[0].sum(-1, keepdim=True) * w)
        else:
            module.register_forward_hook(
                lambda m, x, y, w=w: (y[0] * (1 + w), *y[1:]) if isinstance(y, tuple) else y * (1 + w)
            )
    losses = []
    for example in examples:
        cache = None
        if peft.site == "keys_values":
            cache = DynamicCache()
            for number in range(spec.layers):
                kv = weights[f"{number}.w"].view(FRONT, 2, spec.kv_heads, spec.head_dim)
                k, v = (kv[:, i].transpose(0, 1)[None] for i in (0, 1))
                cache.update(k, v, number)
        logits = model(torch.from_numpy(example.tokens)[None], past_key_values=cache).logits[0]
        target = torch.from_numpy(example.tokens[example.target_start :])
        losses.append(
            torch.nn.functional.cross_entropy(logits[example.target_start - 1 : -1], target, reduction="sum")
        )
    return torch.stack(losses).sum()


@pytest.mark.parametrize(
    ("site", "path", "does"),
    [
        ("linear", "self_attn.q_proj", "update"),
        ("linear", "self_attn.o_proj", "update"),
        ("linear", "self_attn.k_proj", "scale"),
        ("linear", "mlp.down_proj", "scale"),
        ("linear", "mlp.down_proj", "rewrite"),
        ("linear", "mlp.gate_proj", "rewrite"),
        ("block", "attention", "scale"),
        ("block", "mlp", "scale"),
        ("keys_values", "attention", "extend"),
        ("embedding", "embedding", "extend"),
    ],
)
def test_a_method_at_any_site_equals_a_hook_there(site, path, does, tmp_path):
    spec = BACKBONES["llama"]
    peft = HookSpec(method="hook", site=site, path=path, does=does)
    task: PeftTask = make_task("a").model_copy(update={"peft": peft})
    plain = make_tenant(spec, make_task("b", r=3), [9, 4], tmp_path / "b")
    given = make_tenant(spec, make_task("a"), [7, 12], tmp_path / "a")
    torch.manual_seed(0)
    places = [EMBEDDING] if site == "embedding" else range(spec.layers)
    adapter = {
        f"{layer}.w": 0.1 * torch.randn(*each.tensors[0].shape, dtype=torch.float64)
        for layer in places
        for each in METHODS.get("hook").attachments(peft, spec, layer)
    }
    tenants = [Tenant(task, given.examples, adapter, given.folder), plain]
    stage = Stage(spec, range(spec.layers), first=True, last=True, weights=load_hf_model(spec))
    for tenant in tenants:
        stage.add_task(tenant.task, tenant.adapter)
    batch = build_microbatch(
        lay_out(tenants, "pack"),
        [t.examples for t in tenants],
        task_ids=[t.task.id for t in tenants],
        extras=[extra(t.task.peft) for t in tenants],
    )
    losses_K = stage.forward(batch, None)
    alone = Stage(spec, range(spec.layers), first=True, last=True, weights=load_hf_model(spec))
    alone.add_task(plain.task, plain.adapter)
    own = build_microbatch(lay_out([plain], "pack"), [plain.examples], task_ids=["b"])
    torch.testing.assert_close(losses_K[1:], alone.forward(own, None), rtol=1e-9, atol=1e-9)
    weights = {key: w.clone().requires_grad_() for key, w in adapter.items()}
    expected = hooked_loss(spec, peft, weights, given.examples)
    torch.testing.assert_close(losses_K[0], expected, rtol=1e-9, atol=1e-9)
    losses_K[0].backward()
    expected.backward()
    for key, w in weights.items():
        torch.testing.assert_close(stage.task_parameters("a")[key].grad, w.grad, rtol=1e-7, atol=1e-9)
