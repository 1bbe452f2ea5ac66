"""The current instances of one endpoint, as plain data. It is independent of backends, clocks and event loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from triton_distributed.discovery.base import Added, Change, Removed, Snapshot, same
from triton_distributed.names import EndpointName, Instance


class EndpointTable:
    """The instances of one endpoint. All its clients and policies read the same table.

    The table holds what discovery reports and no history: one row for each instance of the endpoint.

    Attributes:
        endpoint: the endpoint; changes of other endpoints are ignored.
        instances: sorted by id. A change replaces the tuple, so code that holds the old one may go on reading it.
        by_id: the same instances by id; a change replaces the mapping.
        listeners: called without arguments after each effective change. A listener may remove itself while it runs;
            one that is added meanwhile is called from the next change on.
    """

    __slots__ = ("by_id", "endpoint", "instances", "listeners")

    def __init__(self, endpoint: EndpointName) -> None:
        self.endpoint = endpoint
        self.instances: tuple[Instance, ...] = ()
        self.by_id: Mapping[int, Instance] = MappingProxyType({})
        self.listeners: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"<EndpointTable {self.endpoint} ids={[each.id for each in self.instances]}>"

    def apply(self, change: Change) -> None:
        """Apply a change. A change of another endpoint, or one that is already known, has no effect."""
        if isinstance(change, Added):
            new = change.instance
            if new.endpoint != self.endpoint:
                return
            old = self.by_id.get(new.id)
            if old is not None and same(old, new):
                return
            self._replace([*(each for each in self.instances if each.id != new.id), new])
        elif isinstance(change, Removed):
            if change.endpoint != self.endpoint or change.instance_id not in self.by_id:
                return
            self._replace(each for each in self.instances if each.id != change.instance_id)
        else:
            self._replace_all(change)

    def _replace_all(self, snapshot: Snapshot) -> None:
        found = {each.id: each for each in snapshot.instances if each.endpoint == self.endpoint}
        if found.keys() == self.by_id.keys() and all(same(each, self.by_id[id]) for id, each in found.items()):
            return
        self._replace(found.values())

    def _replace(self, instances: Iterable[Instance]) -> None:
        self.instances = tuple(sorted(instances, key=lambda each: each.id))
        self.by_id = MappingProxyType({each.id: each for each in self.instances})
        for listener in tuple(self.listeners):
            listener()
