"""Each example runs in a folder of its own, so that nothing else on the machine is found or disturbed."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def private(trd_dir):
    """TRD_DIR for the programs."""
    return trd_dir
