"""Time in tests: `n * MS`, so that a slow machine can stretch all of it with TRD_TEST_TIME_SCALE."""

from __future__ import annotations

import os

SCALE = float(os.environ.get("TRD_TEST_TIME_SCALE", "1"))

#: One millisecond of test time, in seconds.
MS = 0.001 * SCALE

#: Seconds to wait for something that must happen. Nothing passes sooner or later because of it: only a failure takes
#: this long, so it is far above what a busy machine needs, and below the time after which a test is ended (`timeout` in
#: pyproject.toml).
PATIENCE_S = 120.0 * SCALE

#: A time limit is added to the clock and subtracted again, which rounds. uvloop's clock moves in whole milliseconds: where
#: it has not moved in between, what is left may be more than the limit by less than this, in seconds.
ROUNDED_S = 1e-6
