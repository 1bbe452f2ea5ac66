"""How long a worker takes to compute a prompt, learned from what it did. Pure."""

from __future__ import annotations

PRIOR = (0.020, 15e-6, 4e-10)
"""Seconds, seconds a token, and seconds a token squared, of a worker of which nothing is known yet: rounded from the
mocker of Dynamo 1.6, which has 0.0165, 15.2e-6 and 4.2e-10."""

FORGETTING = 0.98
"""The weight of a measurement falls by this factor with each new one: about the last 50 count."""

PULL = 5e-5
"""How much the prior counts beside the measurements. It decides what they leave open, e.g. if all prompts are alike."""

SCALE = 1e-4
"""Tokens are counted in ten thousands inside, so that the three coefficients have similar sizes."""

LEAST_S = 1e-4


class PrefillSpeed:
    """Seconds of a prefill as a + b·t + c·t², with t the tokens that are not cached, and no coefficient below 0.

    The coefficients are those of least squares over all measurements, of which older ones count less (Haykin, Adaptive
    Filter Theory, chapter 10), with a small pull to the prior (ridge regression).

    Args:
        like: the speed of a worker that is likely similar, which is the prior then; None for `prior`.
        prior: what is thought without a measurement; see `PRIOR`.

    Attributes:
        measured: measurements so far.
    """

    __slots__ = ("_a", "_b", "_c", "_prior", "_sums", "_with_s", "measured")

    def __init__(self, like: PrefillSpeed | None = None, *, prior: tuple[float, float, float] = PRIOR) -> None:
        a, b, c = prior
        self._a, self._b, self._c = a, b / SCALE, c / SCALE**2
        if like is not None:
            self._a, self._b, self._c = like._a, like._b, like._c
        self._prior = (self._a, self._b, self._c)
        self._sums = [0.0] * 5  # Of 1, t, t², t³, t⁴.
        self._with_s = [0.0] * 3  # Of s, s·t, s·t², with s the seconds.
        self.measured = 0

    def seconds(self, tokens: int) -> float:
        """Seconds to compute this many tokens; 0 for none."""
        if tokens <= 0:
            return 0.0
        t = tokens * SCALE
        found = self._a + (self._b + self._c * t) * t
        return found if found > LEAST_S else LEAST_S

    def note(self, tokens: int, seconds: float) -> None:
        """Note that a worker with nothing else to compute took `seconds` for `tokens` that were not cached."""
        if tokens <= 0 or seconds <= 0:
            return
        t = tokens * SCALE
        sums, with_s, power = self._sums, self._with_s, 1.0
        for at in range(5):
            sums[at] = sums[at] * FORGETTING + power
            if at < 3:
                with_s[at] = with_s[at] * FORGETTING + power * seconds
            power *= t
        self.measured += 1
        self._a, self._b, self._c = self._solved()

    def _solved(self) -> list[float]:
        """The coefficients of least squares. If one is negative, it is taken as 0, and the others are solved anew."""
        sums, pull = self._sums, PULL * self._sums[0]
        used = [0, 1, 2]
        while True:
            rows = [
                [sums[i + j] + (pull if i == j else 0.0) for j in used] + [self._with_s[i] + pull * self._prior[i]]
                for i in used
            ]
            count = len(used)
            for i in range(count):  # Gauss: the matrix is positive definite, so no pivot is 0.
                for row in rows[i + 1 :]:
                    factor = row[i] / rows[i][i]
                    for j in range(i, count + 1):
                        row[j] -= factor * rows[i][j]
            found = [0.0, 0.0, 0.0]
            for i in reversed(range(count)):
                rest = sum(rows[i][j] * found[used[j]] for j in range(i + 1, count))
                found[used[i]] = (rows[i][count] - rest) / rows[i][i]
            lowest = min(used, key=found.__getitem__)
            if found[lowest] >= 0.0 or count == 1:
                return found
            used.remove(lowest)
