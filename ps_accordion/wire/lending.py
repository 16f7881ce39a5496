"""Who reads whose lane, and messages whose payloads are lent rather than sent: a state machine, but for the memory that it maps.

    worker                                     server
      my lane                      ──>           opens it
      opens it                     <──           I read yours; my lane
      I read yours                 ──>           lends from now on
      lends from now on            <──           I have heard that

The worker repeats what it says until it has the last answer. Until then, and where one side cannot read the other's memory,
payloads go through the socket; `Lending.news` says once a link which way they go, and why. Nothing waits for it.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from ..errors import WireError
from .actions import Note, Peer, Send
from .bundle import Part
from .lane import LEAST, Loan, OtherLane, OwnLane, Span
from .messages import Lane, Lent, Push, Result

__all__ = ["Lending"]

REPEAT_S = 0.1
"""How often a worker says again what has no answer."""
OFF, AWAY = "servers.lane is off", "its address is not ipc://"


@dataclass
class _Link:
    """What is known of a peer.

    Attributes:
        here: Whether it is on this host, as far as its address tells.
        lane: Its lane, if this process reads it.
        identity: Of the lane that it said it has; 0 for none, or before it has said anything.
        why: Why this process does not read it.
        reads: Whether the peer reads the lane of this process.
        why_not: Why it does not; "" where it does, or has not said.
        heard: Whether the peer knows what this process says of its lane.
        told: Whether all of that was said in the log.
        due: When the peer is told again.
    """

    here: bool = True
    lane: OtherLane | None = None
    identity: int = 0
    why: str = ""
    reads: bool = False
    why_not: str = ""
    heard: bool = False
    told: bool = False
    due: float = 0.0

    @property
    def settled(self) -> bool:
        """Whether both sides know which way payloads go."""
        return self.heard and (self.reads or bool(self.why_not)) and (self.lane is not None or bool(self.why))


class Lending:
    """The lane of this process, and those that it reads. One thread, but for `take`, `reads` and `lent`.

    Args:
        on: Whether this process lends and borrows at all.
    """

    def __init__(self, *, on: bool = False) -> None:
        self.lent_bytes = 0
        """Of payloads that were lent, each time that a message says so to one peer or several."""
        self.borrowed_bytes = 0
        self._own: OwnLane | None = None
        self._why = "" if on else OFF
        self._links: dict[Peer, _Link] = {}
        self._read = False
        self._others: weakref.WeakValueDictionary[int, OtherLane] = weakref.WeakValueDictionary()
        """By identity: one process may be several peers, one after another."""

    # ------------------------------------------------------------ who reads what

    def begin(self, link: str, address: str) -> None:
        """Offer the lane to whoever listens at `address`, from anew; `link` is the name of the connection."""
        self._links[link] = _Link() if address.startswith("ipc://") else _Link(here=False, why=AWAY, why_not=AWAY, heard=True)

    def begin_again(self, link: str) -> None:
        """Offer the lane anew: the connection was lost, and there may be another process behind it."""
        if link in self._links and self._links[link].here:
            self._links[link] = _Link()

    def tick(self, now: float) -> list[Send]:
        """Say again to servers what they have not answered."""
        if self._why == OFF:
            return []
        late = [
            (peer, link) for peer, link in self._links.items() if isinstance(peer, str) and not link.settled and now >= link.due
        ]
        for _, link in late:
            link.due = now + REPEAT_S
        return [Send((peer,), self.said(peer)) for peer, _ in late]

    def news(self) -> list[Note]:
        """Return `lane` (link, push, pull, reason) for each server, once: whether payloads go by a lane there, and why not."""
        notes = []
        for peer, link in self._links.items():
            if isinstance(peer, str) and link.settled and not link.told and self._why != OFF:
                link.told = True
                fields = {"link": peer, "push": link.reads, "pull": link.lane is not None}
                notes.append(Note("lane", fields | {"reason": link.why or link.why_not}))
        return notes

    def on_lane(self, peer: Peer, message: Lane) -> list[Send]:
        """Take in what a peer says; a worker is answered at once."""
        link = self._links.get(peer)
        if link is None:
            if isinstance(peer, str):
                return []
            self._forget_the_dead()
            link = self._links[peer] = _Link()
        own = self._made()
        link.heard = message.heard
        link.reads = own is not None and message.reads == own.identity
        link.why_not = "" if link.reads else self._why or message.reason
        if message.identity != link.identity or (link.lane is None and not link.why):
            link.identity = message.identity
            link.lane, link.why = self._opened(message)
        link.told = link.told and link.settled
        self._read = any(each.reads for each in self._links.values())
        return [Send((peer,), self.said(peer))] if isinstance(peer, bytes) else []

    def said(self, peer: Peer) -> Lane:
        """Return what this process says of lanes to a peer."""
        link, own = self._links.get(peer, _Link()), self._made()
        identity, descriptor = (0, 0) if own is None else (own.identity, own.descriptor)
        # No reason before it is known whether the peer's lane can be read: with one, the peer takes this for the last word.
        reads, why = (0, "") if link.lane is None else (link.lane.identity, self._why)
        return Lane(identity, os.getpid(), descriptor, reads, link.why or why, link.reads or bool(link.why_not))

    def _made(self) -> OwnLane | None:
        """Return the lane of this process, which is made when it is first offered."""
        if self._own is None and not self._why:
            try:
                self._own = OwnLane()
            except OSError as error:
                self._why = f"no memory can be shared: {error.strerror}"
        return self._own

    def _opened(self, message: Lane) -> tuple[OtherLane | None, str]:
        if self._why == OFF:
            return None, OFF
        if not message.identity:
            return None, message.reason or "it has no lane"
        known = self._others.get(message.identity)
        if known is not None:
            return known, ""
        try:
            lane = OtherLane(message.process, message.descriptor, message.identity)
        except (OSError, WireError) as error:
            return None, f"its memory cannot be read: {error}"
        self._others[message.identity] = lane
        return lane, ""

    def _forget_the_dead(self) -> None:
        """Let go of the lanes of processes that have ended: connections come and go without a word."""
        for peer, link in list(self._links.items()):
            if isinstance(peer, bytes) and link.lane is not None and _is_gone(link.lane.process):
                del self._links[peer]

    # ------------------------------------------------------------ out

    def take(self, nbytes: int) -> NDArray[np.uint8] | None:
        """Return memory of the lane for a payload; None where nobody would read it there, or it is too small to be worth it."""
        own = self._own
        return own.take(nbytes) if own is not None and self._read and nbytes >= LEAST else None

    def reads(self, peer: Peer) -> bool:
        """Whether a peer reads the lane of this process."""
        link = self._links.get(peer)
        return link is not None and link.reads

    def lent(self, part: Part) -> Part:
        """Return what is said to those who read the lane: where the payload lies. The message itself if that is elsewhere."""
        message, payload = part
        if self._own is None or not isinstance(message, Push | Result) or not message.frames:
            return part
        count = len(message.frames)
        spans: list[Span] = []
        for frame in payload[:count]:
            span = self._own.span_of(frame)
            if span is None:
                return part
            spans.append(span)
        self.lent_bytes += sum(span.nbytes for span in spans)
        return Lent(message, self._own.identity, list(spans), self._own.digest_of(spans, payload[:count])), payload[count:]

    def seal(self, payload: NDArray[np.uint8]) -> None:
        """Compute the checksum of a payload that is about to be lent, on the thread that has made it. Others are left alone."""
        if self._own is not None:
            self._own.seal(payload.data)

    # ------------------------------------------------------------ in

    def is_known(self, peer: Peer, lent: Lent) -> bool:
        """Whether this process reads the lane that a message is about. If not, the peer must be told."""
        link = self._links.get(peer)
        return link is not None and link.lane is not None and link.lane.identity == lent.identity

    def borrowed(self, peer: Peer, lent: Lent, behind: Sequence[Buffer]) -> tuple[Part, Loan] | None:
        """Return a message with its payload, which is yet to be verified; None where it has come after that was overwritten.

        Raises:
            WireError: The payload is not inside the lane.
        """
        lane = self._links[peer].lane
        assert lane is not None, "is_known says so first"
        loan = lane.loan([Span(*span) for span in lent.spans], lent.digest)
        if not loan.stands:
            return None
        self.borrowed_bytes += sum(span[1] for span in lent.spans)
        return (lent.message, (*loan.frames, *behind)), loan

    def close(self) -> None:
        """Let go of all lanes. Closing twice is harmless."""
        self._links.clear()
        self._read = False
        own, self._own, self._why = self._own, None, OFF
        if own is not None:
            own.close()


def _is_gone(process: int) -> bool:
    with contextlib.suppress(PermissionError):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
    return False
