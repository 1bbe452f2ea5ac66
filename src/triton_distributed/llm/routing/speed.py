"""How long a worker takes to compute a prompt, learned from what it did. Pure."""

from __future__ import annotations

from collections.abc import Sequence

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
        t2 = t * t
        t3 = t2 * t
        s0, s1, s2, s3, s4 = self._sums
        self._sums = [
            s0 * FORGETTING + 1.0,
            s1 * FORGETTING + t,
            s2 * FORGETTING + t2,
            s3 * FORGETTING + t3,
            s4 * FORGETTING + t3 * t,
        ]
        w0, w1, w2 = self._with_s
        self._with_s = [w0 * FORGETTING + seconds, w1 * FORGETTING + t * seconds, w2 * FORGETTING + t2 * seconds]
        self.measured += 1
        self._a, self._b, self._c = self._solved()

    def _solved(self) -> Sequence[float]:
        """The coefficients of least squares. If one is negative, it is taken as 0, and the others are solved anew.

        The elimination of Gauss is written out: it runs for each request that comes alone. The matrix is positive
        definite, so no pivot is 0.
        """
        s0, s1, s2, s3, s4 = self._sums
        w0, w1, w2 = self._with_s
        p0, p1, p2 = self._prior
        pull = PULL * s0
        m0, m1, m2 = diagonal = s0 + pull, s2 + pull, s4 + pull
        r0, r1, r2 = right = w0 + pull * p0, w1 + pull * p1, w2 + pull * p2
        f1, f2 = s1 / m0, s2 / m0
        m11, m12 = m1 - f1 * s1, s3 - f1 * s2
        f = (s3 - f2 * s1) / m11
        c = (r2 - f2 * r0 - f * (r1 - f1 * r0)) / (m2 - f2 * s2 - f * m12)
        b = (r1 - f1 * r0 - m12 * c) / m11
        a = (r0 - (s1 * b + s2 * c)) / m0
        if a >= 0.0 and b >= 0.0 and c >= 0.0:
            return a, b, c
        found = [0.0, 0.0, 0.0]
        i, j = (1, 2) if a <= b and a <= c else (0, 2) if b <= c else (0, 1)
        between = self._sums[i + j]
        f = between / diagonal[i]
        second = (right[j] - f * right[i]) / (diagonal[j] - f * between)
        first = (right[i] - between * second) / diagonal[i]
        if first >= 0.0 and second >= 0.0:
            found[i], found[j] = first, second
        else:
            last = j if first <= second else i
            found[last] = right[last] / diagonal[last]
        return found
