"""The private names of torch that the runtime uses, and torch releases that have them."""

import ast
import re
from pathlib import Path

import pytest
import torch

from muxtune.support.errors import UserError
from runtime.device import torch_internals
from runtime.device.torch_internals import CHECKED_TORCH, PRIVATE_NAMES, find

RUNTIME = Path(torch_internals.__file__).parents[1]


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_the_installed_torch_has_every_private_name(name):
    assert find(name) is not None
    assert torch.__version__.startswith(f"{CHECKED_TORCH}."), "check the names, then renew CHECKED_TORCH"


def test_a_name_that_torch_has_dropped_is_one_line_that_says_what_it_is_for(monkeypatch):
    monkeypatch.delattr(torch.distributed.distributed_c10d, "_get_default_store")
    name = "torch.distributed.distributed_c10d._get_default_store"
    expected = (
        f"torch {torch.__version__} has no {name}; the timeout of a meeting needs it, as torch 2.13 has it"
    )
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        torch_internals.default_store()


def test_what_the_profiler_says_is_asked_anew():
    assert not torch_internals.is_profiling()
    with torch.autograd.profiler.profile():
        assert torch_internals.is_profiling()
    assert not torch_internals.is_profiling()


def test_an_interceptor_sees_what_torch_does_and_which_of_it_writes():
    seen = []

    def handler(operation, arguments, options):
        seen.append((operation.name(), torch_internals.writes(operation)))
        return operation(*arguments, **options)

    with torch_internals.intercepting(handler):
        tensor = torch.zeros(2)
        tensor.add_(1.0)
    assert ("aten::add_.Tensor", True) in seen
    assert ("aten::add.Tensor", False) not in seen
    assert tensor.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "path", sorted(RUNTIME.rglob("*.py")), ids=lambda path: str(path.relative_to(RUNTIME))
)
def test_private_names_of_torch_are_used_in_one_module_only(path):
    if path != Path(torch_internals.__file__):
        assert not private_names(ast.parse(path.read_text()))


def private_names(tree: ast.Module) -> set[str]:
    """Names with an underscore in front that are torch's, or of an object that is not our own."""
    typing = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            words = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found |= {word for word in words if word.startswith("_")}
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("torch.") and "._" in a.name}
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            found |= {node.attr} - own
    return found - {"_exit"}  # os's


@pytest.mark.parametrize(
    "code",
    [
        "import torch._dynamo",
        "from torch._ops import OpOverload",
        "torch._foreach_norm([])",
        "x.storage()._cdata",
    ],
)
def test_the_search_for_private_names_finds_them(code):
    assert private_names(ast.parse(code))
