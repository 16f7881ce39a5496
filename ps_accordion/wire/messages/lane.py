"""Payloads in memory that processes of one host share: who reads whose, and where a payload lies."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from .base import Count, Message, Seed, Text
from .rounds import Push, Result

__all__ = ["Lane", "Lent"]


class Lane(Message, tag="lane", frozen=True):
    """Worker to server, and what it answers: my lane, and whether I read yours.

    Attributes:
        identity: Of the sender's lane; 0 where it has none.
        process: Number of the sender's process.
        descriptor: Of its lane, there.
        reads: Identity of the receiver's lane, if the sender reads it; else 0.
        reason: Why it does not, or has no lane of its own; "" where both are well, or not known yet.
        heard: Whether the sender knows what the receiver says of its lane.
    """

    identity: Seed
    process: Count
    descriptor: Count
    reads: Seed = 0
    reason: Text = ""
    heard: bool = False


class Lent(Message, tag="lent", frozen=True):
    """Who reads the sender's lane: a message whose payload lies there. What else it has behind it follows as frames.

    Attributes:
        message: What is said.
        identity: Of the lane.
        spans: Offset, length and stamp of each payload frame.
        digest: xxh3-64 of their bytes, one after another.
    """

    message: Push | Result
    identity: Seed
    spans: Annotated[list[tuple[Seed, Count, Seed]], Meta(min_length=1, max_length=16)]
    digest: Seed
