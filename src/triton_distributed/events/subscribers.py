"""The inboxes of one process's subscriptions, by subject."""

from __future__ import annotations

from triton_distributed.events.inbox import Inbox


class Subscribers:
    """Delivers each event to all inboxes of its subject."""

    def __init__(self) -> None:
        self._inboxes: dict[str, list[Inbox]] = {}  # One inbox for each subscription of the program.

    def add(self, inbox: Inbox) -> bool:
        """Add an inbox. Return True if it is the first of its subject."""
        known = self._inboxes.get(inbox.subject)
        # A new list each time: a delivery under way iterates over the old one.
        self._inboxes[inbox.subject] = [*known, inbox] if known else [inbox]
        return not known

    def remove(self, inbox: Inbox) -> bool:
        """Remove an inbox, if it is there. Return True if it was the last of its subject."""
        known = self._inboxes.get(inbox.subject, ())
        left = [each for each in known if each is not inbox]
        if len(left) == len(known):
            return False
        if left:
            self._inboxes[inbox.subject] = left
        else:
            del self._inboxes[inbox.subject]
        return not left

    def deliver(self, subject: str, data: bytes, lost: int = 0) -> None:
        """Push an event to every inbox of the subject."""
        for inbox in self._inboxes.get(subject, ()):
            inbox.push(data, lost)

    def inboxes(self) -> list[Inbox]:
        """All inboxes."""
        return [inbox for inboxes in self._inboxes.values() for inbox in inboxes]

    def subjects(self) -> list[str]:
        """The subjects with a subscription."""
        return list(self._inboxes)

    def close(self) -> None:
        """Close all inboxes. The events in them can still be read."""
        for inboxes in list(self._inboxes.values()):
            for inbox in inboxes:
                inbox.close(keep=True)
