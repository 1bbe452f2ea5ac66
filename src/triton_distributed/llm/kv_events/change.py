"""How the known blocks of a cache have changed. Values only."""

from __future__ import annotations

from array import array

import msgspec


class Change(msgspec.Struct, gc=False):
    """What to tell those who keep a copy: first `cleared`, then `removed`, then `stored`.

    Attributes:
        stored: keys of blocks that are held from now on. The blocks before each are held, or come earlier.
        removed: keys of blocks that are not held any more, and those of the blocks after them.
        cleared: nothing from before is held any more.
    """

    stored: array[int]
    removed: array[int]
    cleared: bool = False

    def __bool__(self) -> bool:
        return bool(self.stored or self.removed or self.cleared)


def keys_array() -> array[int]:
    """An empty array of keys of blocks, 8 bytes each."""
    return array("Q")
