"""Exceptions of a user's own, in a module that a test can hide from the caller."""

from __future__ import annotations


class OutOfTokens(Exception):
    """Plain."""


class Odd(Exception):
    """Needs arguments that its `args` do not tell."""

    def __init__(self, *, needed: int, given: str) -> None:
        super().__init__(f"{needed} were needed, {given} came")
        self.needed, self.given = needed, given


class OddLookup(LookupError):
    """A base that is built in, and a `__str__` of its own."""

    def __init__(self, key: str, table: dict[str, int]) -> None:
        self.key, self.table = key, table

    def __str__(self) -> str:
        return f"{self.key} is not among {len(self.table)}"
