"""The fixture of these tests: `trd`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.command import Trd


@pytest.fixture
def trd(trd_dir: Path) -> Iterator[Trd]:
    """Runs `trd` with a private TRD_DIR."""
    command = Trd()
    try:
        yield command
        command.close()
    finally:
        command.abandon()
