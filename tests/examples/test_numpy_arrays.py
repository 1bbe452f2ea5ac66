"""NumPy arrays: sent, computed with in a thread, and streamed back as what they were."""

from __future__ import annotations

import re

from tests.examples.programs import run, serving


def test_numpy_arrays():
    with serving("numpy_arrays/server.py"):
        lines = run("numpy_arrays/client.py")

    image = r"(\d+) +x (\d+) +float32, +([\d,]+) bytes, mean ([\d.]+)"
    (sent,) = re.findall(rf"^sent +{image}$", lines[0])
    assert sent[:3] == ("2048", "2048", "16,777,216")
    received = [match.groups() for line in lines if (match := re.fullmatch(rf"received +{image}", line))]
    assert [int(height) for height, *_ in received] == [2**n for n in range(10, -1, -1)]
    assert [int(size.replace(",", "")) for _, _, size, _ in received] == [4 * 4**n for n in range(10, -1, -1)]
    assert all(abs(float(mean) - float(sent[3])) < 0.001 for *_, mean in received)

    drawn = [line for line in lines if not line.startswith(("sent", "received"))]
    assert len(drawn) == 32
    assert drawn == drawn[::-1] == [line[::-1] for line in drawn], "the rings are round"
