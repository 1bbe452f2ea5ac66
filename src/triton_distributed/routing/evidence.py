"""What the calls of one process say about an instance, and when it differs from its peers by more than chance."""

from __future__ import annotations

from math import exp, inf, log, sqrt

HALF_LIFE_S = 30.0  # a call counts half after that time (Finagle's success rate looks at 30 s)
MEMORY = 100.0  # of more calls only so many are remembered, the newest most: an instance of good name can turn bad
NOTHING = 1e-9  # calls: what has faded to less is none
SHORTEST_S = 0.001  # answers that come sooner are told apart by nobody


class Evidence:
    """How the calls to one instance ended lately, older ones counted less.

    Attributes:
        answered: calls that ended well.
        failed: calls that failed, by the instance's fault or perhaps so.
        events: what made them fail, counted once each: one lost connection may end many calls.
        timed: calls whose first answer was timed, and those of them that wait for longer than their peers had to.
        logs: the natural logarithms of those seconds, added up.
        squares: their squares, added up.
        timed_looks: at how many looks there were times since the one before.
        slow_looks: how often in a row it was found to be slow.
        fresh: events since it was looked at.
        enough: so many of them are worth a look.
    """

    __slots__ = (
        "_cause",
        "_new_times",
        "answered",
        "enough",
        "events",
        "failed",
        "fresh",
        "logs",
        "slow_looks",
        "squares",
        "timed",
        "timed_looks",
    )

    def __init__(self, enough: int) -> None:
        self.answered = self.failed = self.events = 0.0
        self.timed = self.logs = self.squares = 0.0
        self.timed_looks = self.slow_looks = self.fresh = 0
        self._new_times = False
        self.enough = enough
        self._cause: int | None = None

    @property
    def calls(self) -> float:
        """Calls that have ended one way or the other."""
        return self.answered + self.failed

    def note_failure(self, cause: int | None) -> bool:
        """A call failed.

        Args:
            cause: what it has in common with others, as the connection that was lost; None for a cause of its own.

        Returns:
            whether that makes enough for a look.
        """
        self.failed += 1
        if cause is not None and cause == self._cause:
            return False
        self._cause = cause
        self.events += 1
        self.fresh += 1
        return self.fresh >= self.enough

    def note_time(self, seconds: float) -> None:
        """The first answer to a call took so long."""
        value = log(max(seconds, SHORTEST_S))
        self._new_times = True
        self.timed += 1
        self.logs += value
        self.squares += value * value

    def looked_at(self, slow: bool, waiting: bool) -> None:
        """Its times were compared.

        Args:
            slow: what was found.
            waiting: calls that have no answer yet were among them.
        """
        self.timed_looks += self._new_times or waiting
        self.slow_looks = self.slow_looks + 1 if slow else 0
        self._new_times = False

    def fade(self, keep: float) -> None:
        """Let all of it count less, by the factor `keep`, and remember no more than `MEMORY` calls."""
        share = min(keep, MEMORY / self.calls) if self.calls else 0.0
        self.answered *= share
        self.failed *= share
        self.events *= share
        share = min(keep, MEMORY / self.timed) if self.timed else 0.0
        self.timed *= share
        self.logs *= share
        self.squares *= share


def likelihood_gain(failed: float, answered: float, peers_failed: float, peers_answered: float) -> float:
    """How much better two rates of failure explain what was seen than a common one does.

    Returns:
        the logarithm of the ratio of the likelihoods: half the statistic G of the G-test (S. S. Wilks, "The
        Large-Sample Distribution of the Likelihood Ratio", 1938). Where there is a common rate, whatever it is, a value
        above g has a probability of about exp(-g) or less.
    """
    calls, peers_calls = failed + answered, peers_failed + peers_answered
    gain = 0.0
    for own, theirs in ((failed, peers_failed), (answered, peers_answered)):
        share = (own + theirs) / (calls + peers_calls)
        for count, total in ((own, calls), (theirs, peers_calls)):
            if count > NOTHING:
                gain += count * log(count / (total * share))
    return gain


class Times:
    """The times of some calls: how many, the sums of their logarithms and of the squares of those."""

    __slots__ = ("count", "logs", "squares")

    def __init__(self, count: float = 0.0, logs: float = 0.0, squares: float = 0.0) -> None:
        self.count, self.logs, self.squares = count, logs, squares

    def add(self, other: Times, sign: int = 1) -> None:
        """Put others' with these, or take them away."""
        self.count += sign * other.count
        self.logs += sign * other.logs
        self.squares += sign * other.squares

    @property
    def mean(self) -> float:
        """The mean of the logarithms."""
        return self.logs / self.count

    @property
    def seconds(self) -> float:
        """The geometric mean, which one long call among many short ones hardly moves."""
        return exp(self.mean)

    @property
    def uncertainty(self) -> float:
        """The variance of `mean`."""
        return max(0.0, self.squares / self.count - self.mean**2) / self.count


def deviations(own: Times, peers: Times) -> float:
    """By how many standard errors the logarithms of one exceed those of the other in the mean.

    Source: B. L. Welch, "The Generalization of 'Student's' Problem when Several Different Population Variances are
    Involved", 1947. Of work that differs much, long and short prompts for one, the variance is large, and so more calls
    are needed before a difference counts.
    """
    error = sqrt(own.uncertainty + peers.uncertainty)
    difference = own.mean - peers.mean
    return difference / error if error else inf if difference > 0 else 0.0
