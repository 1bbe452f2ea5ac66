"""Fails a test that matches the words of another library, which change with that library's next release.

`pytest.raises(…, match=…)` is held to this: without what a foreign exception said, the text must match all the same. Foreign
are exceptions of other packages, and what the operating system or Python's codecs have to say.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

OURS = ("triton_distributed", "tests", "builtins", "__main__")


def foreign_words(error: BaseException) -> Iterator[str]:
    """What others said of all that led to this error."""
    rest, seen = [error], set[int]()
    while rest:
        each = rest.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        rest += [more for more in (each.__cause__, each.__context__) if more is not None]
        if isinstance(each, OSError) and isinstance(each.errno, int):
            yield os.strerror(each.errno)
        theirs = type(each).__module__.split(".")[0] not in OURS
        if theirs or (each is not error and isinstance(each, (UnicodeError, RecursionError))):
            yield str(each)


def is_ours(pattern: str | re.Pattern[str], error: BaseException) -> bool:
    """Whether the pattern matches what is left of the error's text without foreign words."""
    text = str(error)
    for words in foreign_words(error):
        if words:
            text = text.replace(words, "…")
    return re.search(pattern, text) is not None


def _checked(match: str | re.Pattern[str], check: Callable[[BaseException], bool] | None, error: BaseException) -> bool:
    if not is_ours(match, error):
        pytest.fail(
            f"matches the words of another library: {match!r} in {str(error)!r}; see tests/words.py", pytrace=False
        )
    return check is None or check(error)


def _raises(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    match = kwargs.get("match")
    if match is not None and (args or "expected_exception" in kwargs):
        kwargs["check"] = functools.partial(_checked, match, kwargs.get("check"))
    return original(*args, **kwargs)


def pytest_configure(config: pytest.Config) -> None:
    original = pytest.raises
    pytest.raises = functools.partial(_raises, original)
    config.add_cleanup(lambda: setattr(pytest, "raises", original))
