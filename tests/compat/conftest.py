"""Fixtures of the compatibility tests."""

from __future__ import annotations

from tests.runtime.conftest import cluster, unix

__all__ = ["cluster", "unix"]
