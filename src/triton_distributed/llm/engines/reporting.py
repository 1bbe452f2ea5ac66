"""The KV events of an engine that publishes over ZeroMQ: where it publishes, and who hears it."""

from __future__ import annotations

import asyncio
import shutil
import tempfile

import msgspec

from triton_distributed.llm.contract.cache import Publish
from triton_distributed.llm.contract.engine import EngineMetrics
from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.kv_events.subscriber import EventSubscriber

__all__: list[str] = []


class Reporting:
    """The option `kv_events` of vLLM and SGLang, which publish in the same way.

    Args:
        option: `on` for sockets in a folder of its own, `off`, or an endpoint, e.g. `tcp://*:5557`.
        replay: with an endpoint: where the engine answers with earlier events; empty for nowhere.
        ranks: data-parallel ranks of the engine. The engine adds the rank to the ports, so several need an endpoint.

    Attributes:
        endpoint, replay: what the engine gets; empty if it does not publish.

    Raises:
        InvalidParameter: an option is invalid.
    """

    def __init__(self, option: str, replay: str, ranks: int) -> None:
        if option not in ("on", "off") and "://" not in option:
            raise InvalidParameter("kv_events", f"expected on, off or an endpoint, e.g. tcp://*:5557; got {option!r}")
        if replay and "://" not in option:
            raise InvalidParameter("kv_replay", "kv_events is not an endpoint")
        if ranks > 1 and option != "off":
            for name, given in (("kv_events", option), ("kv_replay", replay)):
                if given != "on" and given and not given.rpartition(":")[2].isdigit():
                    raise InvalidParameter(name, f"the ranks add their numbers to the port, and {given!r} has none")
        self._private = option == "on"
        self.endpoint, self.replay = ("", "") if option in ("on", "off") else (option, replay)
        self._ranks = ranks
        self._folder = ""
        self._publish: Publish | None = None
        self._subscribers: list[EventSubscriber] = []

    def wanted(self, publish: Publish) -> bool:
        """Note that the worker wants events, before the engine gets its arguments. Returns whether it will get them."""
        if self._private and self._ranks == 1 and not self._folder:
            self._folder = tempfile.mkdtemp(prefix="trd-kv-")
            self.endpoint, self.replay = f"ipc://{self._folder}/events", f"ipc://{self._folder}/replay"
        self._publish = publish if self.endpoint else None
        return self._publish is not None

    def start(self) -> None:
        """Hear the engine."""
        if self._publish is None:
            return
        for rank in range(self._ranks):
            endpoint, replay = _reachable(self.endpoint, rank), _reachable(self.replay, rank)
            subscriber = EventSubscriber(endpoint, self._publish, replay=replay, rank=rank)
            subscriber.start()
            self._subscribers.append(subscriber)

    def added_to(self, metrics: EngineMetrics) -> EngineMetrics:
        """The engine's metrics with those of its events."""
        unread, lost = sum(each.unread for each in self._subscribers), sum(each.lost for each in self._subscribers)
        return msgspec.structs.replace(metrics, kv_unread=unread, kv_lost=lost)

    async def close(self) -> None:
        """Stop hearing it, and remove the folder."""
        for each in self._subscribers:
            await each.close()
        self._subscribers.clear()
        if self._folder:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
            self._folder = ""


def _reachable(endpoint: str, rank: int) -> str:
    """Where to connect for a rank of an engine that listens at `endpoint`."""
    endpoint = endpoint.replace("://*:", "://127.0.0.1:").replace("://0.0.0.0:", "://127.0.0.1:")
    if not rank or not endpoint:
        return endpoint
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{int(port) + rank}"
