"""The load of each instance: the number of this process' streams open on it."""

from __future__ import annotations


class LoadBook:
    """Counts the streams that this process has open on each instance, from the request to the last item.

    An instance without streams has no entry, so the book is never larger than the number of open streams.
    """

    __slots__ = ("_open",)

    def __init__(self) -> None:
        self._open: dict[int, int] = {}

    def acquire(self, instance_id: int) -> None:
        """Note one more stream on the instance; call `release` when it ends."""
        self._open[instance_id] = self._open.get(instance_id, 0) + 1

    def release(self, instance_id: int) -> None:
        """Note that a stream on the instance has ended.

        Raises:
            ValueError: the instance has no open stream.
        """
        left = self._open.get(instance_id, 0) - 1
        if left > 0:
            self._open[instance_id] = left
        elif left == 0:
            del self._open[instance_id]
        else:
            raise ValueError(f"instance {instance_id} has no open stream to release")

    def inflight(self, instance_id: int) -> int:
        """Return the number of streams that this process has open on the instance."""
        return self._open.get(instance_id, 0)

    def open(self) -> dict[int, int]:
        """Return the number of open streams by instance id, without zeros."""
        return dict(self._open)

    def __getitem__(self, instance_id: int) -> int:
        return self._open.get(instance_id, 0)

    def __len__(self) -> int:
        return len(self._open)

    def __repr__(self) -> str:
        return f"<LoadBook of {sum(self._open.values())} stream(s) on {len(self._open)} instance(s)>"
