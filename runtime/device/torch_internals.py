"""Names that torch keeps to itself, and what we need each one for; the rest of the runtime uses none.

Torch may rename them in any release. So they are looked up when they are needed, by functions that say what
they do in words of ours, and one that is gone ends the command with one line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muxtune.support.errors import UserError

__all__ = [
    "CHECKED_TORCH",
    "PRIVATE_NAMES",
    "Backend",
    "OpOverload",
    "Store",
    "abort_groups",
    "default_store",
    "find",
    "gloo_options",
    "intercepting",
    "is_profiling",
    "set_group_timeout",
    "storage_key",
    "tensor_norms",
    "writes",
]

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Backend, Store
    from torch._ops import OpOverload

CHECKED_TORCH = "2.13"
"""Release of torch that the names are tested with; by its sources, the oldest that we allow has them too."""

PRIVATE_NAMES: dict[str, str] = {
    "torch._foreach_norm": "norms of many gradients at once",
    "torch.UntypedStorage._cdata": "which tensors share memory that they have not got yet",
    "torch.autograd.profiler._is_profiler_enabled": "whether somebody else profiles",
    "torch.distributed.ProcessGroupGloo._Options": "the timeout of a group",
    "torch.distributed.ProcessGroupGloo._Options._timeout": "the timeout of a group",
    "torch.distributed.distributed_c10d._abort_process_group": "ending connections after a failure",
    "torch.distributed.distributed_c10d._get_default_store": "the timeout of a meeting",
    "torch.ops.aten.add_.Tensor._schema": "which operations write",
    "torch.utils._python_dispatch.TorchDispatchMode": "drawing a preset's weights one by one",
}
"""Where each name is, and what it serves for."""

Handler = Callable[["OpOverload", tuple[Any, ...], dict[str, Any]], object]
"""Does an operation of ATen, given its arguments, in place of torch."""


def find(name: str) -> Any:  # noqa: ANN401  # anything that torch has
    """What a private name stands for now.

    Args:
        name: One of :data:`PRIVATE_NAMES`.

    Raises:
        UserError: This torch has no such name; says what it is needed for.
    """
    module, *rest = name.split(".")
    found: Any = import_module(module)
    try:
        for part in rest:
            module = f"{module}.{part}"
            found = getattr(found, part) if hasattr(found, part) else import_module(module)
    except (AttributeError, ImportError) as error:
        why = f"{PRIVATE_NAMES[name]} needs it, as torch {CHECKED_TORCH} has it"
        raise UserError(f"torch {torch.__version__} has no {name}; {why}") from error
    return found


_kept = lru_cache(maxsize=None)(find)
"""Functions, which are asked for often and do not change."""


def tensor_norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Euclidean norm of each tensor, accumulated in a dtype; one kernel for many on a GPU."""
    norms: list[Tensor] = list(_kept("torch._foreach_norm")(tensors, 2, dtype))
    return norms


def storage_key(tensor: Tensor) -> int:
    """Number of the storage that a tensor is a view of, even if that has no memory yet."""
    _kept("torch.UntypedStorage._cdata")
    key: int = tensor.untyped_storage()._cdata
    return key


def is_profiling() -> bool:
    """Whether torch's profiler runs in this process."""
    return bool(find("torch.autograd.profiler._is_profiler_enabled"))


def gloo_options() -> Backend.Options:
    """Options of a gloo group."""
    options: Backend.Options = find("torch.distributed.ProcessGroupGloo._Options")()
    return options


def set_group_timeout(options: Backend.Options, timeout_s: float) -> None:
    """Have groups that are made with these options wait so long for a rank."""
    find("torch.distributed.ProcessGroupGloo._Options._timeout")
    options._timeout = timedelta(seconds=timeout_s)


def abort_groups() -> None:
    """Give up all process groups, and what is under way in them."""
    find("torch.distributed.distributed_c10d._abort_process_group")()


def default_store() -> Store:
    """The store in which the ranks of the default group meet."""
    store: Store = find("torch.distributed.distributed_c10d._get_default_store")()
    return store


def writes(operation: OpOverload) -> bool:
    """Whether an operation of ATen changes one of its arguments."""
    _kept("torch.ops.aten.add_.Tensor._schema")
    return bool(operation._schema.is_mutable)


def intercepting(handler: Handler) -> AbstractContextManager[object]:
    """Inside, every operation of ATen is done by a handler."""
    base: Any = find("torch.utils._python_dispatch.TorchDispatchMode")

    class Intercepting(base):
        def __torch_dispatch__(
            self,
            func: OpOverload,
            types: object,
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> object:
            return handler(func, args, kwargs or {})

    mode: AbstractContextManager[object] = Intercepting()
    return mode
