"""The fixture of these tests: `trd`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.command import PROGRAMS, Trd, usual_environment
from tests.warm import Warm, warm


@pytest.fixture(scope="session")
def forking(neutral_environment: None) -> Iterator[Warm | None]:
    """Forks the commands."""
    with warm(PROGRAMS, usual_environment()) as made:
        yield made


@pytest.fixture
def trd(forking: Warm | None, trd_dir: Path) -> Iterator[Trd]:
    """Runs `trd` with a private TRD_DIR."""
    command = Trd(forking)
    try:
        yield command
        command.close()
    finally:
        command.abandon()
