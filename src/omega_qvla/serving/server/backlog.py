"""Which complete messages may wait for their answers, by their bytes: pure bookkeeping.

A message counts from when its last byte is there until its answer is known, in one sum over all
clients.  Where the sum has no room for another one,

* **newest per client**: the same client's older messages that nobody has read yet make room; they
  are answered ``superseded``, unread.  What of that client was read already does not stand in the
  way: the newer one replaces it in the line (``admission.py``), or it is being computed;
* **bounded**: a message that finds no room even so is answered ``overloaded``, and its bytes are
  forgotten at once.

So the bytes held are at most the limit and, beyond it, a message for each place in the line and in
the batch.  One thread calls all of this, an event loop's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from omega_qvla.errors import ServingError

DEFAULT_LIMIT_BYTES = 256 << 20
MESSAGE_BYTES = 512
"""What a message counts beyond its own bytes, for the objects that keep it."""


@dataclass(eq=False)
class Message:
    """A complete message, until its answer is known.

    Attributes:
        data: its bytes; empty once they are of no use.
        size: what it counts.
        refusal: why it must not be read, or None.
    """

    data: bytes
    size: int
    refusal: ServingError | None = None


@dataclass(eq=False)
class Inbox:
    """One client's messages.

    Attributes:
        unread: those its front has not taken yet, the oldest first.
        counted: those that count, read or not.
        held: what those count.
    """

    unread: deque[Message] = field(default_factory=deque[Message])
    counted: set[Message] = field(default_factory=set[Message])
    held: int = 0


class Backlog:
    """The messages of all clients.

    Args:
        limit: bytes that may wait.

    Attributes:
        held: bytes that wait.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT_BYTES) -> None:
        self._limit = limit
        self.held = 0

    def put(self, inbox: Inbox, data: bytes) -> Message:
        """A message came; it is put last, with or without its bytes."""
        message = Message(data, len(data) + MESSAGE_BYTES)
        room = self._limit - (self.held - inbox.held)
        if message.size > room:
            _give_up(message, ServingError("overloaded", self._full()))
        else:
            if inbox.held + message.size > room:
                self._supersede(inbox)
            inbox.counted.add(message)
            self._count(inbox, message.size)
        inbox.unread.append(message)
        return message

    def take(self, inbox: Inbox) -> Message | None:
        """The oldest message that was not read yet; None where the client is gone."""
        return inbox.unread.popleft() if inbox.unread else None

    def done(self, inbox: Inbox, message: Message) -> None:
        """A message's answer is known."""
        if message in inbox.counted:
            inbox.counted.remove(message)
            self._count(inbox, -message.size)

    def leave(self, inbox: Inbox) -> None:
        """A client is gone, and its messages with it."""
        inbox.unread.clear()
        for message in list(inbox.counted):
            self.done(inbox, message)

    def _count(self, inbox: Inbox, size: int) -> None:
        inbox.held += size
        self.held += size

    def _supersede(self, inbox: Inbox) -> None:
        for older in inbox.unread:
            if older.refusal is None:
                text = "a newer observation of the same client took over before this one was read"
                _give_up(older, ServingError("superseded", text))
                self.done(inbox, older)

    def _full(self) -> str:
        return (
            f"the messages that wait take {self.held} bytes, at most {self._limit} are kept; try "
            "again, or serve fewer robots"
        )


def _give_up(message: Message, error: ServingError) -> None:
    message.data, message.refusal = b"", error
