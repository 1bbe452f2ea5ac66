"""The contents of a type hint at every depth: the classes in it, and whether msgspec or pydantic can check them."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from typing import Any

import msgspec

from triton_distributed.payload.fields import is_model
from triton_distributed.payload.leaf_types import is_made_from_text

_UNCHECKED: tuple[Any, ...] = (None, Any, object, inspect.Parameter.empty)
_ARRIVES_FROM = ("numpy", "torch", "array", "mmap")  # modules whose objects keep their class when they arrive
_PYDANTIC = ("pydantic", "pydantic_core", "pydantic_extra_types", "annotated_types")


def checks_nothing(hint: Any) -> bool:
    """Return whether every value fits a hint."""
    if isinstance(hint, typing.TypeVar):
        return not hint.__constraints__ and checks_nothing(hint.__bound__)
    return any(hint is each for each in _UNCHECKED)


def can_arrive(kind: type) -> bool:
    """Return whether a message can hold an instance of a class unknown to msgspec, or a value to make one from."""
    return (
        is_model(kind)
        or kind.__module__.partition(".")[0] in _ARRIVES_FROM
        or kind in (complex, object)
        or is_made_from_text(kind)
    )


@dataclasses.dataclass
class Contents:
    """The contents of a hint.

    Attributes:
        models: the classes of pydantic models.
        pydantic: the last part found that only pydantic can check, for an error's text.
        msgspec: the last part found that only msgspec can check, for an error's text.
        by_name: whether the hint contains pydantic dataclasses, which travel by field name.
    """

    models: list[Any] = dataclasses.field(default_factory=list)
    pydantic: str | None = None
    msgspec: str | None = None
    by_name: bool = False


def contents(hint: Any, *, arriving: bool) -> Contents:
    """Search a hint: arguments, members of unions, aliases, and the fields of classes.

    Args:
        hint: a resolved annotation.
        arriving: whether values are made from messages; then the members of a union must differ.

    Raises:
        TypeError: a name in the hint cannot be resolved, or two members of a union differ only in their name.
    """
    found = Contents()
    seen: list[Any] = []
    left = [hint]
    while left:
        each = left.pop()
        if any(each is other for other in seen):
            continue
        seen.append(each)
        if arriving and _is_union(each):
            _must_differ(typing.get_args(each))
        _note(each, found)
        left.extend(_inside(each))
    return found


def _note(hint: Any, found: Contents) -> None:
    if is_model(hint):
        found.models.append(hint)
    elif isinstance(hint, dataclasses.InitVar):
        found.pydantic = "an InitVar"
    elif isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        found.msgspec = f"the Struct {hint.__qualname__}"
    elif hasattr(hint, "__attrs_attrs__"):
        found.msgspec = f"the attrs class {hint.__qualname__}"
    elif isinstance(hint, msgspec.Meta):
        found.msgspec = "msgspec.Meta"
    elif _is_of_pydantic(hint):
        found.pydantic = getattr(hint, "__qualname__", None) or repr(hint)
        found.by_name = found.by_name or dataclasses.is_dataclass(hint)


def _is_of_pydantic(hint: Any) -> bool:
    """Return whether a hint is a class or metadata of pydantic, which msgspec does not know."""
    if isinstance(hint, (type, typing.TypeVar)) or typing.get_origin(hint) is not None:
        if not isinstance(hint, type):
            return False
        if dataclasses.is_dataclass(hint) and any(_is_of_pydantic(each.default) for each in dataclasses.fields(hint)):
            return True
        return any(
            hasattr(hint, each)
            for each in ("__get_pydantic_core_schema__", "__pydantic_validator__", "__pydantic_config__")
        )
    return type(hint).__module__.partition(".")[0] in _PYDANTIC or hasattr(hint, "__get_pydantic_core_schema__")


def _inside(hint: Any) -> Iterator[Any]:
    if (alias := getattr(hint, "__value__", None)) is not None and not isinstance(hint, type):
        yield alias  # the value of `type X = …`
    elif (supertype := getattr(hint, "__supertype__", None)) is not None:
        yield supertype  # the type under a NewType
    elif isinstance(hint, typing.TypeVar):
        yield from hint.__constraints__ or (hint.__bound__,)
    elif (origin := typing.get_origin(hint)) is typing.Literal:
        return
    elif origin is not None:
        yield from typing.get_args(hint)
        yield origin
    elif isinstance(hint, dataclasses.InitVar):
        yield hint.type
    elif has_fields(hint):
        yield from field_hints(hint).values()


def has_fields(kind: Any) -> bool:
    """Return whether `kind` is a dataclass, Struct, TypedDict, NamedTuple or attrs class."""
    return isinstance(kind, type) and (
        dataclasses.is_dataclass(kind)
        or issubclass(kind, msgspec.Struct)
        or is_typed_dict(kind)
        or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
        or hasattr(kind, "__attrs_attrs__")
    )


def is_typed_dict(kind: Any) -> bool:
    """Return whether `kind` is a TypedDict of `typing` or of `typing_extensions`."""
    return isinstance(kind, type) and issubclass(kind, dict) and hasattr(kind, "__total__")


def field_hints(kind: Any) -> dict[str, Any]:
    """Return the hints of a class's fields.

    Raises:
        TypeError: a name in a hint cannot be resolved.
    """
    try:
        hints = typing.get_type_hints(kind, include_extras=True)
    except Exception as error:  # a name that only a type checker knows, or a class inside a function
        raise TypeError(
            f"an annotation in class {kind.__qualname__} cannot be resolved ({error}); "
            "define or import the name at module level, outside `if TYPE_CHECKING`"
        ) from None
    return {name: hint for name, hint in hints.items() if typing.get_origin(hint) is not typing.ClassVar}


def _is_union(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    return origin is typing.Union or getattr(origin, "__name__", "") == "UnionType"


def _must_differ(members: tuple[Any, ...]) -> None:
    shapes: list[tuple[Any, Any]] = []
    for each in members:
        shape = _shape(each)
        if shape is None:
            continue
        for other, its in shapes:
            if its == shape:
                raise TypeError(
                    f"{each.__qualname__} can never arrive, because every value that fits it also fits "
                    f"{other.__qualname__}; give each a field that differs, e.g. kind: Literal['…']"
                )
        shapes.append((each, shape))


def _shape(kind: Any) -> Any:
    """Return the facts that decide whether a dict fits a class, or None if the user's own code decides too."""
    if is_model(kind):
        decorators = kind.__pydantic_decorators__
        if decorators.field_validators or decorators.model_validators or kind.__pydantic_root_model__:
            return None
        return str(kind.model_fields), kind.model_config
    if dataclasses.is_dataclass(kind) and not hasattr(kind, "__post_init__") and not _is_of_pydantic(kind):
        return field_hints(kind)
    return None
