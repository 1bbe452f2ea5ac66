"""A test that needs the words of another library is found, and one that asserts our own is not."""

from __future__ import annotations

import errno
import os

import msgspec
import pytest

from triton_distributed.errors import DecodeError
from triton_distributed.payload.codec import decode


def broken_text() -> None:
    """Raises our error, whose text ends with what msgspec said."""
    decode(b"\xa1\xff", None)


def refused(match: str) -> str:
    """What is said about a test that matches this."""
    with pytest.raises(pytest.fail.Exception) as caught, pytest.raises(DecodeError, match=match):
        broken_text()
    return str(caught.value)


def test_our_own_words_may_be_matched() -> None:
    with pytest.raises(DecodeError, match="a payload that arrived cannot be read: ."):
        broken_text()
    with pytest.raises(ValueError, match="^ours$"):
        raise ValueError("ours") from KeyError("theirs")


def test_words_of_msgspec_are_found() -> None:
    assert "matches the words of another library: '(?i)utf-8'" in refused("(?i)utf-8")
    with pytest.raises(pytest.fail.Exception), pytest.raises(msgspec.ValidationError, match="Expected"):
        msgspec.convert(1, str)


def test_words_of_the_operating_system_are_found() -> None:
    missing = OSError(errno.ENOENT, os.strerror(errno.ENOENT), "/some/file")
    with pytest.raises(OSError, match="/some/file"):
        raise missing
    with pytest.raises(pytest.fail.Exception), pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
        raise missing


def test_a_match_that_fails_and_a_check_of_the_test_count_as_ever() -> None:
    with pytest.raises(AssertionError), pytest.raises(ValueError, match="^other$"):
        raise ValueError("ours")
    with pytest.raises(ValueError, match="ours", check=lambda error: error.args == ("ours",)):
        raise ValueError("ours")
    with pytest.raises(AssertionError), pytest.raises(ValueError, match="ours", check=lambda error: False):
        raise ValueError("ours")
