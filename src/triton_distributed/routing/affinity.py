"""Session affinity: calls with one value in their metadata go to one instance."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from triton_distributed.names import Instance
from triton_distributed.routing.load import LoadBook
from triton_distributed.routing.policies import LeastLoaded

SLACK = 4
"""Open streams that an instance may have beyond the share that `spill` allows. With few streams, shares say little."""

_MASK = (1 << 64) - 1


class Affinity:
    """Sends all calls with the same value under one key of their metadata to the same instance.

    All processes choose alike, without asking each other. If an instance goes, only its own values move; if one comes,
    it takes its share and no other value moves. If the instance does not take a call, its value's next one gets it, the
    same each time. A call without the key goes to the instance on which this process has the fewest streams open.

    Source: D. Thaler and C. Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", 1998 (rendezvous hashing);
    V. Mirrokni et al., "Consistent Hashing with Bounded Loads", 2016 (the way out of an overloaded instance).

    Args:
        key: the name of the value, in the call's metadata or in its travelling values, e.g. "user". Values are compared
            as text.
        spill: a call avoids an instance on which this process has more than `spill` times its mean of open streams, and
            `SLACK` more. Infinity keeps each value on its instance at any load.

    Raises:
        ValueError: `spill` is below 1: then no instance might be within it.
    """

    def __init__(self, key: str, *, spill: float = 2.0) -> None:
        if not spill >= 1:
            raise ValueError(f"spill={spill!r}: must be at least 1, a multiple of the mean load")
        self._key, self._spill = key, spill
        self._without = LeastLoaded()

    def __call__(
        self, request: Any, instances: tuple[Instance, ...], load: LoadBook, metadata: Mapping[str, Any]
    ) -> Instance:
        value = metadata.get(self._key)
        if value is None:
            return self._without(request, instances, load)
        seed = int.from_bytes(blake2b(str(value).encode("utf-8", "surrogatepass"), digest_size=8).digest())
        chosen = max(instances, key=lambda each: _rank(seed, each.id))
        if load[chosen.id] > SLACK:
            most = SLACK + self._spill * sum(load[each.id] for each in instances) / len(instances)
            if load[chosen.id] > most:
                ranked = sorted(instances, key=lambda each: _rank(seed, each.id), reverse=True)
                return next(each for each in ranked if load[each.id] <= most)
        return chosen

    def __repr__(self) -> str:
        return f"Affinity({self._key!r}, spill={self._spill!r})"


def _rank(seed: int, instance_id: int) -> int:
    """The rank of an instance for a value: the finalizer of MurmurHash3 (64 bits) over both numbers."""
    mixed = seed ^ instance_id
    mixed = (mixed ^ mixed >> 33) * 0xFF51AFD7ED558CCD & _MASK
    mixed = (mixed ^ mixed >> 33) * 0xC4CEB9FE1A85EC53 & _MASK
    return mixed ^ mixed >> 33
