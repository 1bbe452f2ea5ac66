"""Options of engines: the text of a command line, or already a number."""

from __future__ import annotations

from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.model import ROLES, Role

__all__: list[str] = []

MOST = 2**31 - 1


def whole(option: str, value: str | int | float, least: int) -> int:
    """Read a whole number of at least `least`.

    Raises:
        InvalidParameter: it is not one, or it is above `MOST`.
    """
    try:
        found = int(value) if not isinstance(value, float) else least - 1
    except ValueError:
        found = least - 1
    if not least <= found <= MOST:
        raise InvalidParameter(option, f"expected a whole number from {least} to {MOST}, got {value!r}")
    return found


def yes(option: str, value: str | bool) -> bool:
    """Read `true` or `yes`, `false` or `no`.

    Raises:
        InvalidParameter: it is another word.
    """
    words: dict[str | bool, bool] = {True: True, "true": True, "yes": True, False: False, "false": False, "no": False}
    if value not in words:
        raise InvalidParameter(option, f"expected true or false, got {value!r}")
    return words[value]


def read_role(value: str) -> Role:
    """Read the role of a worker.

    Raises:
        InvalidParameter: there is no such role.
    """
    for each in ROLES:
        if value == each:
            return each
    raise InvalidParameter("role", f"expected one of {', '.join(ROLES)}, got {value!r}")


def paths(option: str, value: str) -> dict[str, str]:
    """Read paths by name: `name=path,name=path`; empty for none.

    Raises:
        InvalidParameter: a name or a path is missing, or a name is there twice.
    """
    found: dict[str, str] = {}
    for each in value.split(",") if value else ():
        name, _, path = (part.strip() for part in each.partition("="))
        if not name or not path or name in found:
            raise InvalidParameter(option, f"expected name=path,name=path with different names, got {value!r}")
        found[name] = path
    return found
