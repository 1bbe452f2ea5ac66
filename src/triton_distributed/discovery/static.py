"""Fixed addresses, for deployments whose workers do not move."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from triton_distributed.discovery.base import Sink, Watch
from triton_distributed.discovery.watchers import Watchers
from triton_distributed.errors import ConfigError, InvalidName
from triton_distributed.names import MAX_INSTANCE_ID, EndpointName, Instance

SETTING = "TRD_STATIC"


class StaticDiscovery:
    """Knows the instances it was given. Registering is accepted and changes nothing.

    Args:
        instances: themselves, or the text of `TRD_STATIC`: `ns.comp.ep=tcp://host:port[;…]`, with several addresses of
            one instance separated by commas, and an endpoint named again for each further instance.

    Raises:
        ConfigError: the text cannot be read.
    """

    def __init__(self, instances: str | Iterable[Instance]) -> None:
        self.instances = _parsed(instances) if isinstance(instances, str) else tuple(instances)
        self.where = f"static:{len(self.instances)} instances of {SETTING}"
        self._watchers = Watchers()

    async def register(self, instance: Instance) -> None:
        """Accepted: whoever should find the worker has its address already."""

    async def withdraw(self, instance: Instance) -> None:
        """Accepted; clients see the worker go when its connections close."""

    async def watch(self, endpoint: EndpointName | None, sink: Sink) -> Watch:
        return self._watchers.add(endpoint, sink, self.instances)

    async def close(self) -> None:
        self._watchers.close()


def _parsed(text: str) -> tuple[Instance, ...]:
    instances: dict[tuple[EndpointName, int], Instance] = {}
    for entry in filter(None, (each.strip() for each in text.split(";"))):
        name, mark, rest = entry.partition("=")
        addresses = tuple(each.strip() for each in rest.split(",") if each.strip())
        if not mark or not addresses:
            raise ConfigError(SETTING, entry, "an entry is ns.comp.ep=tcp://host:port[,…]; entries are separated by ;")
        for address in addresses:
            if "://" not in address:
                raise ConfigError(SETTING, entry, f"{address!r} is not an address such as tcp://host:port")
        try:
            endpoint = EndpointName.parse(name.strip())
        except InvalidName as error:
            raise ConfigError(SETTING, entry, str(error)) from error
        instance = Instance(endpoint, _id(endpoint, addresses), addresses)
        if (endpoint, instance.id) in instances:
            raise ConfigError(SETTING, entry, "this instance is named twice")
        instances[endpoint, instance.id] = instance
    return tuple(instances.values())


def _id(endpoint: EndpointName, addresses: tuple[str, ...]) -> int:
    """The same id in every process that is given the same text."""
    text = "\0".join((endpoint.path, *addresses))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % (MAX_INSTANCE_ID - 1) + 1
