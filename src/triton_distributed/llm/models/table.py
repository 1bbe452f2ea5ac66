"""Which models are served: a table that follows the changes of discovery. Pure."""

from __future__ import annotations

import logging

from triton_distributed.discovery.base import Added, Change, Snapshot
from triton_distributed.llm.contract.model import ModelCard
from triton_distributed.llm.contract.records import GENERATE, PREFILL, card_of
from triton_distributed.names import EndpointName, Instance

logger = logging.getLogger("triton_distributed.llm")


class Entry:
    """A card with the instances that serve it.

    Attributes:
        card: the model.
        instances: by id; the record of each one's endpoint `generate`, or `prefill`.
        created: when the first one began to serve, in whole seconds since the epoch; 0 if it is not known.
    """

    def __init__(self, card: ModelCard) -> None:
        self.card = card
        self.instances: dict[int, Instance] = {}
        self.created = 0

    def put(self, instance: Instance) -> None:
        """Add an instance, or replace its record."""
        self.instances[instance.id] = instance
        since = int(instance.since)
        self.created = min(self.created, since) if self.created and since else self.created or since


class ModelTable:
    """The models of a namespace.

    Args:
        namespace: of their endpoints.

    Attributes:
        entries: by component. A model leaves with its last instance.
        prefills: the same of the workers that only compute prompts.
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._refused: dict[tuple[EndpointName, int], str] = {}  # Records that cannot be read, with the reason.
        self.entries: dict[str, Entry] = {}
        self.prefills: dict[str, Entry] = {}
        self._ranked: dict[str, list[Entry]] | None = None  # Made again after a change.

    def apply(self, change: Change) -> None:
        """Take a change from discovery."""
        self._ranked = None
        if isinstance(change, Snapshot):
            mine = [each for each in change.instances if self._concerns(each.endpoint)]
            present = {(each.endpoint, each.id) for each in mine}
            entries = [*self.entries.values(), *self.prefills.values()]
            known = [(each.endpoint, id) for entry in entries for id, each in entry.instances.items()]
            for name, id in {*known, *self._refused} - present:
                self._remove(name, id)
            for instance in mine:
                self._put(instance)
        elif isinstance(change, Added):
            if self._concerns(change.instance.endpoint):
                self._put(change.instance)
        elif self._concerns(change.endpoint):
            self._remove(change.endpoint, change.instance_id)

    def _concerns(self, name: EndpointName) -> bool:
        return name.namespace == self._namespace and name.endpoint in (GENERATE, PREFILL)

    def _of(self, name: EndpointName) -> dict[str, Entry]:
        """The entries of an endpoint's kind."""
        return self.entries if name.endpoint == GENERATE else self.prefills

    def prefill_only(self) -> set[str]:
        """The names of the models that have no worker but those that only compute prompts."""
        return {name for entry in self.prefills.values() for name in entry.card.names} - self.ranked().keys()

    def ranked(self) -> dict[str, list[Entry]]:
        """The entries for each name, alias and adapter, the best first: new requests go to it if it can be used.

        The newest generation is best. Between two cards of one generation, which is a mistake, the one that was served
        first. A model's own name goes before an alias of the same text.
        """
        if self._ranked is not None:
            return self._ranked
        names: dict[str, list[Entry]] = {}
        aliases: dict[str, list[Entry]] = {}
        for entry in sorted(self.entries.values(), key=_rank):
            names.setdefault(entry.card.name, []).append(entry)
            for alias in entry.card.names[1:]:
                aliases.setdefault(alias, []).append(entry)
        self._ranked = {**aliases, **names}
        return self._ranked

    def conflicts(self) -> list[tuple[Entry, Entry]]:
        """Pairs of entries with one name and one generation, and different cards; the first of a pair is used."""
        found = []
        first: dict[tuple[str, int], Entry] = {}
        for entry in sorted(self.entries.values(), key=_rank):
            used = first.setdefault((entry.card.name, entry.card.generation), entry)
            if used is not entry:
                found.append((used, entry))
        return found

    def _put(self, instance: Instance) -> None:
        name = instance.endpoint
        try:
            card = card_of(instance, self._namespace)
        except ValueError as error:
            if self._refused.get((name, instance.id)) != str(error):
                self._refused[name, instance.id] = str(error)
                logger.warning("instance %d serves a model that cannot be read: %s", instance.id, error)
            return
        if card is not None:
            self._of(name).setdefault(name.component, Entry(card)).put(instance)

    def _remove(self, name: EndpointName, id: int) -> None:
        self._refused.pop((name, id), None)
        entries = self._of(name)
        entry = entries.get(name.component)
        if entry is not None:
            entry.instances.pop(id, None)
            if not entry.instances:
                del entries[name.component]


def _rank(entry: Entry) -> tuple[int, float, str]:
    since = min(each.since for each in entry.instances.values())
    return -entry.card.generation, since, entry.card.digest
