"""Dynamo's settings in terms of this runtime's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from triton_distributed.config import Config, usual_directories, variable

_BACKENDS = {"file": "file", "etcd": "etcd", "mem": "memory", "memory": "memory"}
_PLANES = {"tcp": "direct", "nats": "nats"}
_EVENT_PLANES = {"nats": "nats", "zmq": ""}


def _one_of(what: str, known: dict[str, str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not isinstance(text, str):
            raise TypeError(f"{what}={text!r}: must be text, one of {', '.join(known)}")
        if text not in known:
            raise ValueError(f"{what}={text!r} is not in this runtime: it has {', '.join(known)}")
        return known[text]

    return read


def _private_folder(text: str) -> Path:
    """The folder of this user below one that others may be able to enter."""
    return Path(text) / usual_directories()[0].name


backend = _one_of("discovery_backend", _BACKENDS)
plane = _one_of("request_plane", _PLANES)
event_plane = _one_of("event_plane", _EVENT_PLANES)

OTHERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "discovery": ("DYN_DISCOVERY_BACKEND", backend),
    "request_plane": ("DYN_REQUEST_PLANE", plane),
    "directory": ("DYN_FILE_KV", _private_folder),
    "etcd_lease_ttl_s": ("ETCD_LEASE_TTL", int),
    "max_message_bytes": ("DYN_TCP_MAX_MESSAGE_SIZE", int),
    "status_port": ("DYN_SYSTEM_PORT", int),
    "status_host": ("DYN_SYSTEM_HOST", str),
    "canary_s": ("DYN_CANARY_WAIT_TIME", float),
    "drain_timeout_s": ("DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", float),
}
"""Dynamo's variables that count where this runtime's own are not set, by field of `Config`."""


def sends_canaries() -> bool:
    """Whether `DYN_HEALTH_CHECK_ENABLED` asks to try idle endpoints with their `health_check_payload`."""
    return variable("DYN_HEALTH_CHECK_ENABLED").lower() in ("1", "true", "yes", "on")


def config_for(discovery: str | None, requests: str | None, events: str | None) -> Config:
    """The settings of a runtime whose program names these backends; None where the environment decides.

    Raises:
        TypeError: a backend is not text.
        ValueError: there is no such backend, or a setting is invalid.
    """
    overrides: dict[str, Any] = {}
    if discovery is not None:
        overrides["discovery"] = backend(discovery)
    if requests is not None:
        overrides["request_plane"] = plane(requests)
    if events is not None and event_plane(events):
        overrides["events"] = event_plane(events)
    return Config.from_env(others=OTHERS, **overrides)
