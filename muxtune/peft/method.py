"""What a PEFT method says in the domain, and the registry of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Protocol, runtime_checkable

from pydantic import SerializeAsAny, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import InitErrorDetails

from muxtune.model import ModelSpec
from muxtune.operators import KINDS, OperatorKind, add_kinds
from muxtune.peft.representation import Attachment, Extra
from muxtune.peft.sites import EMBEDDING
from muxtune.peft.spec import PeftSpec
from muxtune.peft.start import read_start
from muxtune.support.errors import SpecError, UserError
from muxtune.support.registry import Registry


class PeftMethod(Protocol):
    """One PEFT method: a module of :mod:`muxtune.peft`, or of another package.

    Its counterpart of the same name in :mod:`runtime.peft` executes it.
    """

    @property
    def summary(self) -> str:
        """One line that describes it."""
        ...

    @property
    def spec(self) -> type[PeftSpec]:
        """Class of its parameters in the workload file; ``method`` is the method's name."""
        ...

    @property
    def kinds(self) -> Mapping[str, OperatorKind]:
        """Kinds of its operators that are its own; the last dimension of each is tokens."""
        ...

    def check(self, spec: Any, model: ModelSpec, where: str) -> None:  # noqa: ANN401  # its own class
        """Refuse what cannot run on a backbone.

        Args:
            spec: Parameters.
            model: The backbone, whole.
            where: Field of the parameters, for messages.

        Raises:
            SpecError: Names the field, the value and what was expected.
        """
        ...

    def attachments(self, spec: Any, model: ModelSpec, layer: int) -> tuple[Attachment, ...]:  # noqa: ANN401
        """What a task attaches to a layer, in the order of execution.

        Layers that are alike should get the same object: it is compared often.

        Args:
            spec: Parameters.
            model: The backbone, or what one rank has of it; widths are taken from it.
            layer: Number of the layer; ``EMBEDDING`` for the output of the embedding.
        """
        ...

    def extra(self, spec: Any) -> Extra:  # noqa: ANN401
        """What it puts in front of every sequence."""
        ...


@runtime_checkable
class StartingMethod(Protocol):
    """A method whose tasks may start from a saved adapter."""

    def check_start(self, spec: Any, model: ModelSpec, config: Mapping[str, Any], where: str) -> None:  # noqa: ANN401
        """Refuse an adapter that is not one of this task.

        Args:
            spec: Parameters, with ``init``.
            model: The backbone.
            config: Content of the adapter's ``adapter_config.json``.
            where: Field of the parameters, for messages.

        Raises:
            SpecError: Names what differs.
        """
        ...


class _Methods(Registry[PeftMethod]):
    """Methods by name; their operator kinds come to the table with them."""

    def add(self, name: str, entry: PeftMethod) -> None:
        add_kinds(entry.kinds)
        super().add(name, entry)


METHODS: Registry[PeftMethod] = _Methods(
    "PEFT method", group="muxtune.peft", methods=("check", "attachments", "extra"), summary=True
)
"""Registry of methods; the entry point group of other packages is ``muxtune.peft``."""


def _resolve(value: object, handler: ValidatorFunctionWrapHandler) -> PeftSpec:
    """Validate by the method that is named."""
    if isinstance(value, PeftSpec):
        return value
    name = value.get("method") if isinstance(value, Mapping) else None
    if not isinstance(name, str):
        raise ValueError(f"expected a mapping with method, one of {', '.join(METHODS.names())}")
    try:
        method = METHODS.get(name)
    except UserError as error:
        expected = f"a PEFT method; {str(error).rpartition('; ')[2]}"
        details = InitErrorDetails(
            type="literal_error", loc=("method",), input=name, ctx={"expected": expected}
        )
        raise ValidationError.from_exception_data("PeftSpec", [details]) from error
    return method.spec.model_validate(value)


AnyPeft = Annotated[SerializeAsAny[PeftSpec], WrapValidator(_resolve)]
"""Parameters of any registered method, told by ``method``."""


@lru_cache(maxsize=1 << 16)  # a search asks for the same tasks again and again
def attachments(spec: PeftSpec, model: ModelSpec, layer: int = 0) -> tuple[Attachment, ...]:
    """What a task attaches to a layer of a backbone, or of what one rank has of it.

    Args:
        spec: The task's method.
        model: The backbone, or a shard of it.
        layer: Number of the layer; ``EMBEDDING`` for the output of the embedding.

    Raises:
        SpecError: A target matches nothing.
    """
    return METHODS.get(spec.method).attachments(spec, model, layer)


def embedding_attachments(spec: PeftSpec, model: ModelSpec) -> tuple[Attachment, ...]:
    """What a task attaches to the output of the embedding."""
    return attachments(spec, model, EMBEDDING)


def check_peft(spec: PeftSpec, model: ModelSpec, where: str) -> None:
    """Refuse a method that cannot run on a backbone, or start from what it names (``SpecError``)."""
    method = METHODS.get(spec.method)
    method.check(spec, model, where)
    if spec.init is None:
        return
    if not isinstance(method, StartingMethod):
        raise SpecError(f"{where}.init", str(spec.init), f"null: {spec.method} starts from no saved adapter")
    method.check_start(spec, model, read_start(spec.init, f"{where}.init"), where)


def extra(spec: PeftSpec) -> Extra:
    """What a task's method puts in front of every sequence."""
    return METHODS.get(spec.method).extra(spec)


@lru_cache(maxsize=1 << 14)
def mixed_size(spec: PeftSpec, model: ModelSpec) -> int:
    """Largest mixed dimension of a task's adapters in any layer, such as a rank; 0 where none has one."""
    return max(
        (
            each.adapter.dims[mixed]
            for layer in range(model.layers)
            for each in attachments(spec, model, layer)
            if (mixed := KINDS[each.adapter.kind].mixed) is not None
        ),
        default=0,
    )


def all_kinds() -> Sequence[str]:
    """Names of the operator kinds of all methods, those of other packages included."""
    return [name for method in METHODS.names() for name in METHODS.get(method).kinds]
