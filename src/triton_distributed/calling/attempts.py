"""The attempts of one call: who was tried, who may be tried next, and what to say when nobody is left. Pure."""

from __future__ import annotations

from triton_distributed.errors import ConnectionFailed, Draining, Overloaded, Paused
from triton_distributed.names import Instance


class Attempts:
    """The instances that did not take a call's request.

    Attributes:
        tried: their ids.
        failures: (address, reason) of each, in order, for error texts.
        refusal: the refusal to report if no instance takes the request; None where none gave one.
    """

    __slots__ = ("_redial", "failures", "refusal", "tried")

    def __init__(self) -> None:
        self.tried: set[int] = set()
        self.failures: list[tuple[str, str]] = []
        self.refusal: Exception | None = None
        self._redial: set[int] = set()  # Those of `tried` that may be dialled once more.

    def record(
        self,
        instance_id: int,
        failures: list[tuple[str, str]],
        refusal: Exception | None = None,
        redial: bool = False,
    ) -> None:
        """Record that an instance did not take the request.

        Args:
            instance_id: of the instance.
            failures: (address, reason) each.
            refusal: the error for the caller if no instance takes it.
            redial: the connection was lost before a handler began, which says little about the worker. If no other
                instance is left, it is dialled again, once.
        """
        if redial and instance_id not in self.tried:
            self._redial.add(instance_id)
        self.tried.add(instance_id)
        self.failures += failures
        known = self.refusal
        if isinstance(known, Overloaded) and isinstance(refusal, (Draining, Paused)):
            # Not all instances are shutting down: to come back later makes sense.
            refusal = Overloaded(known.endpoint, known.instance_id, known.reason, len(self.tried), known.retry_after_s)
        self.refusal = refusal or known

    def next(
        self, in_rotation: tuple[Instance, ...], listed: tuple[Instance, ...], direct: bool
    ) -> tuple[Instance, ...]:
        """The instances among which the policy chooses next; empty where none is left.

        Args:
            in_rotation: the candidates of a new call.
            listed: all instances that discovery knows.
            direct: the caller wants one instance and no other.
        """
        if not self.tried:
            return in_rotation
        rest: tuple[Instance, ...] = ()
        if not direct:
            rest = tuple(each for each in in_rotation if each.id not in self.tried)
            if not rest:  # One that is out of rotation may be better than none.
                rest = tuple(each for each in listed if each.id not in self.tried)
        return rest or tuple(each for each in listed if each.id in self._redial)

    def chosen(self, instance_id: int) -> None:
        """The policy has chosen this instance: it is not dialled a third time."""
        self._redial.discard(instance_id)

    def error(self, target: str) -> Exception:
        """What the caller gets when no instance is left to try.

        Args:
            target: what was called, for the text.
        """
        return self.refusal or ConnectionFailed(target, self.failures)
