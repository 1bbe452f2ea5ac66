"""The parsing that all commands share: endpoints, numbers and KEY=VALUE pairs."""

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
    """A parser that prints each error as one line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # Epilogs have paragraphs. Abbreviations are not allowed: a new option with the same beginning would break them.
        options = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options}
        super().__init__(*args, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown arguments here, so that the error names the verb, and not the parser above it."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {one_line(message)}; see {self.prog} --help\n")


def endpoint(text: str) -> EndpointName:
    """Parse `namespace.component.endpoint`, or the path that error texts and `trd ls` show if a part contains a dot."""
    try:
        if path := _PATH.fullmatch(text):
            return EndpointName(**path.groupdict())
        return EndpointName.parse(text)
    except InvalidName as error:
        if error.kind == "endpoint" and error.name == text:
            raise argparse.ArgumentTypeError(
                f"{text!r} cannot name an endpoint: write namespace.component.endpoint, "
                "or namespace/components/component/endpoint if a part contains a dot"
            ) from error
        raise argparse.ArgumentTypeError(str(error)) from error


def at_least(low: int) -> Any:
    """Return a parser of whole numbers that are at least `low`."""

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
    """Parse a number of seconds, at least 0.01. A shorter time is most likely a typo."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.01 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds of at least 0.01")
    return number


def pair(text: str) -> tuple[str, str]:
    """Parse `KEY=VALUE`; both are text."""
    key, mark, value = text.partition("=")
    if not mark or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def pairs(given: Iterable[tuple[str, str]] | None) -> dict[str, str]:
    """Return the pairs of a repeated option. If a key is repeated, its last value counts."""
    return dict(given or ())
