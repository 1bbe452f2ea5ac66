"""How long a worker takes to compute a prompt, learned from what it did. Pure."""

from __future__ import annotations

PRIOR = (0.020, 15e-6, 4e-10)
"""Seconds, seconds a token, and seconds a token squared, of a worker of which nothing is known yet: rounded from the
mocker of Dynamo 1.6, which has 0.0165, 15.2e-6 and 4.2e-10."""

FORGETTING = 0.98
"""The weight of a measurement falls by this factor with each new one: about the last 50 count."""

SCALE = 1e-4
"""Tokens are counted in ten thousands inside, so that the three coefficients have similar sizes."""

LEAST_S = 1e-4


class PrefillSpeed:
    """Seconds of a prefill as a + b·t + c·t², with t the tokens that are not cached.

    The coefficients are fitted by recursive least squares with forgetting (Haykin, Adaptive Filter Theory, chapter 10).
    """

    __slots__ = ("_p", "_theta", "measured")

    def __init__(self) -> None:
        a, b, c = PRIOR
        self._theta = [a, b / SCALE, c / SCALE**2]
        self._p = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
        self.measured = 0

    def seconds(self, tokens: int) -> float:
        """Seconds to compute this many tokens; 0 for none."""
        if tokens <= 0:
            return 0.0
        a, b, c = self._theta
        t = tokens * SCALE
        return max(LEAST_S, a + (b + c * t) * t)

    def note(self, tokens: int, seconds: float) -> None:
        """Note that a worker with nothing else to compute took `seconds` for `tokens` that were not cached."""
        if tokens <= 0 or seconds <= 0:
            return
        t = tokens * SCALE
        x = (1.0, t, t * t)
        p = self._p
        px = [sum(row[k] * x[k] for k in range(3)) for row in p]
        gain_over = FORGETTING + sum(x[k] * px[k] for k in range(3))
        gain = [each / gain_over for each in px]
        error = seconds - sum(self._theta[k] * x[k] for k in range(3))
        self._theta = [max(0.0, self._theta[k] + gain[k] * error) for k in range(3)]
        self._p = [[min(1.0, (p[i][j] - gain[i] * px[j]) / FORGETTING) for j in range(3)] for i in range(3)]
        self.measured += 1
