"""Discovery by a fixed list of addresses, for deployments in which another system places the workers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from triton_distributed.discovery.base import Sink, Watch
from triton_distributed.discovery.watchers import Watcher, Watchers
from triton_distributed.errors import ConfigError, DiscoveryError, InvalidName
from triton_distributed.names import EndpointName, Instance
from triton_distributed.redaction import shown

SETTING = "TRD_STATIC"
_FORM = (
    "instances are ns.comp.ep=tcp://host:port, more addresses of one after a comma, more instances after a semicolon"
)


class StaticDiscovery:
    """Lists a fixed set of instances.

    A worker may register, which publishes nothing: it listens on the address of its own settings, and clients find it
    through their lists. Addresses are not checked: a call finds out that an address is dead.

    Args:
        instances: the instances, or text as in `TRD_STATIC`.

    Raises:
        ConfigError: the text is invalid.
    """

    def __init__(self, instances: str | Iterable[Instance]) -> None:
        self.where = f"static:{SETTING}"
        self._instances = tuple(parse_static(instances) if isinstance(instances, str) else instances)
        self._watchers = Watchers()
        self._closed = False

    def __repr__(self) -> str:
        return f"<StaticDiscovery instances={len(self._instances)}{' closed' if self._closed else ''}>"

    async def register(self, instance: Instance) -> None:
        self._check_open()

    async def withdraw(self, instance: Instance) -> None:
        """Do nothing: `register` has published nothing."""

    async def watch(self, endpoint: EndpointName | None, sink: Sink) -> Watch:
        self._check_open()
        watcher: Watcher = self._watchers.add(endpoint, sink, self._instances)
        return watcher

    async def close(self) -> None:
        self._closed = True
        self._watchers.close()

    def _check_open(self) -> None:
        if self._closed:
            raise DiscoveryError("static", self.where, "it was closed")


def parse_static(text: str) -> list[Instance]:
    """Parse `ns.comp.ep=tcp://host:port[,unix:///path][;…]`.

    All processes that read the same entry give it the same id, which depends only on the endpoint and the addresses.

    Raises:
        ConfigError: an entry is invalid or repeated; the error names the entry.
    """
    for part in re.split("[;,]", text):
        address = part.partition("=")[2] or part
        # This check comes first, because a password may contain a semicolon or a comma.
        if "@" in address and not address.strip().startswith("unix://"):
            raise ConfigError(SETTING, text, f"an address cannot have a user and password: {_FORM}")
    found: dict[int, Instance] = {}
    for entry in filter(None, (each.strip() for each in text.split(";"))):
        name, mark, rest = entry.partition("=")
        if not mark:
            raise ConfigError(SETTING, entry, f"no `=`: {_FORM}")
        try:
            endpoint = EndpointName.parse(name.strip())
        except InvalidName as error:
            raise ConfigError(SETTING, entry, f"invalid endpoint name, {error.reason}: {_FORM}") from None
        addresses = tuple(_address(entry, each.strip()) for each in rest.split(","))
        instance = Instance(endpoint, static_id(endpoint, addresses), addresses)
        if instance.id in found:
            raise ConfigError(SETTING, entry, "it is listed twice")
        found[instance.id] = instance
    return list(found.values())


def static_id(endpoint: EndpointName, addresses: tuple[str, ...]) -> int:
    """The id of a listed instance: 63 bits of a hash, never 0."""
    # NUL and newline are control characters, which neither names nor parsed addresses can contain.
    text = "\0".join((endpoint.namespace, endpoint.component, endpoint.endpoint)) + "\n" + "\0".join(addresses)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1 or 1


def _address(entry: str, text: str) -> str:
    """Return one address, checked so that a typo is found here and not by the first call."""
    scheme, _, rest = text.partition("://")
    if not text.isprintable() or " " in text:
        raise ConfigError(SETTING, entry, f"{shown(SETTING, text)!r} is not an address: {_FORM}")
    if scheme == "unix" and rest.startswith("/"):
        return text
    if scheme in ("memory", "nats") and rest:
        return text
    host, mark, port = rest.rpartition(":")
    if scheme == "tcp" and mark and host and port.isascii() and port.isdecimal() and 0 < int(port) <= 65535:
        return text
    raise ConfigError(
        SETTING, entry, f"{shown(SETTING, text)!r} is not an address such as tcp://host:port or unix:///path: {_FORM}"
    )
