"""`python -m benchmarks.survival`: kills, restarts, floods; status 1 where a promise is broken. `make survival`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.survival.fleet import Fleet
from benchmarks.survival.overload import BUSY_LIMITS, LIMITS, busy_overload, overload
from benchmarks.survival.promises import Found
from benchmarks.survival.report import PAGE, RESULT, table, written
from benchmarks.survival.rolling import rolling_kill, rolling_restart
from benchmarks.survival.rotation import rotation
from triton_distributed.testing import EtcdServer, NatsServer, ServerMissing

PHASES = ("kill", "restart", "overload", "rotation")
TCP = {"TRD_LISTEN": "tcp://127.0.0.1:0"}
PLANES: dict[str, dict[str, str]] = {"unix": {}, "tcp": TCP, "etcd": TCP, "nats": {"TRD_REQUEST_PLANE": "nats"}}
WHOLE_S = 60.0
MOST_FLOOD_S = 60.0  # it is one answer of a client process: see ANSWER_TIMEOUT_S


class Survival:
    """One run.

    Args:
        seconds: of the rolling kill; the other phases have their share of it.
        directory: an empty folder with a short path.
    """

    def __init__(self, seconds: float, directory: Path) -> None:
        self._seconds = seconds
        self._directory = directory
        self._places = 0

    async def phase(self, phase: str, plane: str) -> Found:
        """One phase over one kind of connection, with processes of its own."""
        flood_s, scale = min(self._seconds / 2, MOST_FLOOD_S), min(1.0, self._seconds / 20)
        run: dict[str, Callable[[Fleet], Awaitable[Found]]] = {
            "kill": lambda fleet: rolling_kill(fleet, self._seconds),
            "restart": lambda fleet: rolling_restart(fleet, max(1, round(self._seconds / 12))),
            "overload": lambda fleet: overload(fleet, flood_s, scale),
            "rotation": lambda fleet: rotation(fleet, max(3, round(self._seconds / 3))),
        }
        async with self._fleet(plane, LIMITS) as fleet:
            found = await run[phase](fleet)
        if phase == "overload":
            async with self._fleet(plane, BUSY_LIMITS) as fleet:
                found.figures |= await busy_overload(fleet, flood_s / 2, scale)
        return found

    @asynccontextmanager
    async def _fleet(self, plane: str, limits: tuple[float, int, int]) -> AsyncIterator[Fleet]:
        self._places += 1
        place = self._directory / str(self._places)
        place.mkdir(mode=0o700)
        environ = dict(PLANES[plane])
        async with AsyncExitStack() as stack:
            if plane == "nats":
                environ["NATS_SERVER"] = (await stack.enter_async_context(NatsServer(environ=os.environ))).url
            elif plane == "etcd":
                environ["ETCD_ENDPOINTS"] = (await stack.enter_async_context(EtcdServer(environ=os.environ))).url
            yield await stack.enter_async_context(Fleet(place, environ, limits))


def _chosen(text: str, known: tuple[str, ...]) -> list[str]:
    names = [each for each in text.split(",") if each]
    if not names or (wrong := set(names) - set(known)):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(wrong)) if names else text!r}: some of {','.join(known)}")
    return names


def _seconds(text: str) -> float:
    value = float(text)
    if not 2 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text}: from 2 to 86400")
    return value


async def run(phases: list[str], planes: list[str], seconds: float, directory: Path) -> dict[str, dict[str, Found]]:
    """All phases over all planes, one after the other."""
    survival = Survival(seconds, directory)
    found: dict[str, dict[str, Found]] = {}
    for phase in phases:
        for plane in planes:
            each = found.setdefault(phase, {})[plane] = await survival.phase(phase, plane)
            print(f"{phase:9} {plane:5} {'; '.join(each.broken) or 'all promises kept'}", flush=True)
            for words in each.words:
                print(f"          {words}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.survival", description="Kill workers and see")
    parser.add_argument(
        "--only", type=lambda text: _chosen(text, PHASES), default=list(PHASES), help=f"some of {','.join(PHASES)}"
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=WHOLE_S, help="of the rolling kill; the other phases in proportion (60)"
    )
    parser.add_argument(
        "--planes",
        type=lambda text: _chosen(text, tuple(PLANES)),
        default=["unix", "tcp"],
        help=f"some of {','.join(PLANES)} (unix,tcp); etcd is TCP with discovery through etcd",
    )
    parser.add_argument("--json", type=Path, help="result file; a whole run's: benchmarks/results/survival.json")
    arguments = parser.parse_args()
    whole = arguments.only == list(PHASES) and arguments.seconds >= WHOLE_S and {"unix", "tcp"} <= {*arguments.planes}
    path = arguments.json or (RESULT if whole else RESULT.with_name("survival-partial.json"))
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="trv", dir="/tmp" if os.path.isdir("/tmp") else None) as directory:
        try:
            found = asyncio.run(run(arguments.only, arguments.planes, arguments.seconds, Path(directory)))
        except ServerMissing as error:
            parser.error(str(error))
    result = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe(),
        "load": [load_before, os.getloadavg()[0]],
        "options": {"planes": arguments.planes, "seconds": arguments.seconds},
        "found": {
            phase: {plane: each.as_json() for plane, each in by_plane.items()} for phase, by_plane in found.items()
        },
    }
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if path == RESULT:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")
    print(f"\n{table(result)}\nwritten to {path}")
    broken = 0
    for phase, by_plane in found.items():
        for plane, each in by_plane.items():
            for text in each.broken:
                broken += 1
                print(f"BROKEN: {phase}, {plane}: {text}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
