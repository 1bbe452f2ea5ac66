"""What the commands' arguments have in common: how endpoints, numbers and KEY=VALUE pairs are read."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from triton_distributed.cli.failure import USAGE, one_line
from triton_distributed.errors import InvalidName
from triton_distributed.names import EndpointName

_PATH = re.compile(r"(?P<namespace>.+?)/components/(?P<component>[^/]+)/(?P<endpoint>.+)", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # Epilogs have paragraphs; an abbreviation would break with the next option of the same beginning.
        options = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options}
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {one_line(message)}; see {self.prog} --help\n")


def endpoint(text: str) -> EndpointName:
    """`namespace.component.endpoint`, or the path that error texts and `trd ls` show where a part contains a dot."""
    try:
        if path := _PATH.fullmatch(text):
            return EndpointName(**path.groupdict())
        return EndpointName.parse(text)
    except InvalidName as error:
        if error.kind == "endpoint" and error.name == text:
            raise argparse.ArgumentTypeError(
                f"{text!r} cannot name an endpoint: write namespace.component.endpoint, "
                "or namespace/components/component/endpoint where a part contains a dot"
            ) from error
        raise argparse.ArgumentTypeError(str(error)) from error


def at_least(low: int) -> Any:
    """A reader of whole numbers that are not below `low`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return number

    return read


def seconds(text: str) -> float:
    """A time of at least 10 ms: what is shorter is a slip of the pen."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.01 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds of at least 0.01")
    return number


def pair(text: str) -> tuple[str, str]:
    """`KEY=VALUE`, both as text."""
    key, mark, value = text.partition("=")
    if not mark or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def pairs(given: Iterable[tuple[str, str]] | None) -> dict[str, str]:
    """The pairs of a repeated option; of one key the last counts."""
    return dict(given or ())
