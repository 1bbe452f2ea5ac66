"""Blind mutation of byte strings, for where no coverage guides the search."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence


def mutations(seeds: Sequence[bytes], chance: random.Random, most: int) -> Iterator[bytes]:
    """The seeds, then endless variations: bits turned, pieces cut, doubled, joined and replaced by telling numbers.

    Args:
        most: length of the longest, bytes.
    """
    telling = [
        n.to_bytes(size, "little") for size in (1, 2, 4, 8) for n in (0, 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
    ]
    yield from seeds
    while True:
        data = bytearray(chance.choice(seeds) if seeds else b"")
        for _ in range(chance.randint(1, 8)):
            at = chance.randrange(len(data) + 1)
            length = min(chance.randint(1, 64), len(data) - at)
            match chance.randrange(6):
                case 0 if at < len(data):
                    data[at] ^= 1 << chance.randrange(8)
                case 1:
                    del data[at : at + length]
                case 2:
                    data[at:at] = data[at : at + length]
                case 3:
                    data[at:at] = chance.choice(seeds) if seeds else b""
                case 4:
                    number = chance.choice(telling)
                    data[at : at + len(number)] = number
                case _:
                    data[at:at] = chance.randbytes(chance.randint(1, 16))
        yield bytes(data[:most])
