"""An item of a stream, with an event, comments and an id next to its data."""

from __future__ import annotations

from typing import Any

import msgspec

__all__: list[str] = []  # Programs import these names from `triton_distributed.runtime`.


class Annotated(msgspec.Struct, gc=False, repr_omit_defaults=False):
    """One item of a response: data, and optionally an event, comments and an id.

    A handler may yield one to send an event with data or instead of data. `generate(…, annotated=True)`, the default,
    returns items in this form. Accessor methods and `get` both exist, because older and newer programs use either.

    Args, by position (the names belong to the accessors):
        data: the value; None if the item has no value.
        event: a name, e.g. `error`.
        comment: lines of text.
        id: an id of the item.
    """

    _data: Any = None
    _event: str | None = None
    _comment: list[str] | None = None
    _id: str | None = None

    def data(self) -> Any:
        """The value that the handler yielded."""
        return self._data

    def event(self) -> str | None:
        """The event's name."""
        return self._event

    def comments(self) -> list[str]:
        """The comments; may be empty."""
        return self._comment or []

    def id(self) -> str | None:
        """The item's id."""
        return self._id

    def is_error(self) -> bool:
        """Whether the event is `error`."""
        return self._event == "error"

    def get(self, name: str) -> Any:
        """Return a part by its name: `data`, `event`, `comment`, `comments` or `id`.

        Raises:
            ValueError: there is no such part.
        """
        if name == "data":
            return self._data
        if name == "event":
            return self._event
        if name in ("comment", "comments"):
            return self.comments()
        if name == "id":
            return self._id
        raise ValueError(f"an item has data, event, comment, comments and id, not {name!r}")

    def __repr__(self) -> str:
        return f"Annotated(data={self._data!r}, event={self._event!r}, comment={self.comments()!r}, id={self._id!r})"


def parts(item: Annotated) -> list[Any]:
    """Return the item in the form that travels."""
    return [item.data(), item.event(), item.comments(), item.id()]
