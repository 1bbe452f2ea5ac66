"""Whether a process lives, is ready and is healthy, each with the reasons."""

from __future__ import annotations

from typing import Any, Protocol

from triton_distributed.config import Config
from triton_distributed.serving.endpoint import ServedEndpoint
from triton_distributed.status.loop import ANSWER_S, Loop, Stuck


class Judged(Protocol):
    """The part of a runtime that is judged. Any thread may read it: these are plain attributes."""

    config: Config
    worker: Any

    @property
    def closing(self) -> bool: ...


def state_of(endpoint: ServedEndpoint) -> str:
    """The state of a served endpoint: `starting`, `serving`, `paused`, `draining` or `unlisted`."""
    state = endpoint.state
    return "unlisted" if state == "serving" and not endpoint.listed else state


class Health:
    """Judges a runtime. Each judgement is a dict for JSON, whose first value is the verdict.

    Args:
        runtime: the runtime.
        loop: its event loop.
    """

    def __init__(self, runtime: Judged, loop: Loop) -> None:
        self._runtime, self._loop = runtime, loop

    def loop(self) -> dict[str, Any]:
        """Whether the event loop turns; if not, for how long it has been stuck, and at which line of code."""
        try:
            self._loop.call(lambda: None)
        except Stuck:
            return self.stuck()
        return {"turns": True}

    def stuck(self) -> dict[str, Any]:
        """The description of an event loop that has not answered in time."""
        stuck_s = max(ANSWER_S, self._loop.stuck_s)
        return {"turns": False, "stuck_s": round(stuck_s, 3), "place": self._loop.place()}

    def live(self) -> tuple[bool, dict[str, Any]]:
        """Whether the process should go on. A stuck loop counts only once an endpoint is served, and after a while:
        before that the program may load a model."""
        limit_s, stuck_s = self._runtime.config.live_timeout_s, self._loop.stuck_s
        is_live = not limit_s or stuck_s < limit_s or not self._runtime.worker.server.endpoints
        if stuck_s < ANSWER_S:
            return is_live, {"live": is_live}
        place = self._loop.place()
        return is_live, {"live": is_live, "stuck_s": round(stuck_s, 3), "limit_s": limit_s, "place": place}

    def ready(self) -> tuple[bool, dict[str, Any]]:
        """Whether clients should call this process: its loop turns, and discovery lists all that it serves."""
        endpoints = {each.name.path: state_of(each) for each in self._runtime.worker.server.endpoints}
        loop = self.loop()
        reasons = [_SAYS[state].format(path) for path, state in endpoints.items() if state != "serving"]
        if self._runtime.closing:
            reasons.insert(0, "the process drains")
        elif not endpoints:
            reasons.insert(0, "no endpoint is served")
        if not loop["turns"]:
            place = loop["place"] and f" at {loop['place']}"
            reasons.insert(0, f"the event loop has been stuck for {loop['stuck_s']:.1f} s{place}")
        is_ready = not reasons
        return is_ready, {"ready": is_ready, "reasons": reasons, "endpoints": endpoints, "loop": loop}


_SAYS = {
    "starting": "{} is not registered in discovery yet",
    "paused": "{} is paused",
    "draining": "{} drains",
    "unlisted": "{} is not listed in discovery",
}
