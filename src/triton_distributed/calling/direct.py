"""The policy of `direct`: one instance, by its id."""

from __future__ import annotations

from typing import Any

from triton_distributed.calling.candidates import EndpointView
from triton_distributed.errors import InstanceNotFound
from triton_distributed.names import Instance
from triton_distributed.routing.load import LoadBook


class Directly:
    """Chooses the instance of this id, also while it is out of rotation: the caller wants no other.

    Raises:
        InstanceNotFound: nobody has that id; it names those that exist.
    """

    __slots__ = ("_id", "_view")

    def __init__(self, view: EndpointView, instance_id: int) -> None:
        self._view = view
        self._id = instance_id

    def __call__(self, request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        found = self._view.table.by_id.get(self._id)
        if found is None:
            raise InstanceNotFound(self._view.name.path, self._id, list(self._view.table.by_id))
        return found
