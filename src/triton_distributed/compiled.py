"""The compiled build: which one this is, and what classes say to mypyc. See CONTRIBUTING.md, "The compiled build"."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

__all__ = ["is_compiled"]

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr as mypyc_attr
else:  # So that the package does not need mypy_extensions: the decorator only speaks to mypyc, when it compiles.

    def mypyc_attr(*_: str, **__: Any) -> Any:
        return lambda cls: cls


E = TypeVar("E", bound=BaseException)


def caused(error: E, cause: BaseException | None) -> E:
    """Return an error with its cause, to be raised: mypyc ignores the `from` of a `raise`."""
    error.__cause__ = cause
    return error


def is_compiled() -> bool:
    """Return whether the code that each call runs is compiled; False if it runs from its Python source."""
    spec = find_spec("triton_distributed.wire.stream")
    return spec is not None and not str(spec.origin).endswith(".py")
