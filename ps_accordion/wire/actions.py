"""What a state machine asks its loop to do.

A machine has no sockets, threads or clocks: `handle(message, ..., now)` and `tick(now)` return a list of these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from typing_extensions import Buffer

from .messages import Message

__all__ = ["Action", "Note", "Peer", "Record", "Send", "Stop"]

Peer = str | bytes
"""A connection: the name that was given to `Transport.connect`, or the routing id of whoever connected to the listener."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send one message, with the same bytes, to each of `peers`."""

    peers: tuple[Peer, ...]
    message: Message
    payload: tuple[Buffer, ...] = ()


@dataclass(frozen=True, slots=True)
class Note:
    """Write an event to the log."""

    event: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """Put plain JSON on the disk before any action that follows in the list is carried out."""

    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process: with `code` 0 when all is well, else for `reason`, because of `culprit`."""

    code: int
    culprit: str = ""
    reason: str = ""


Action = Send | Note | Record | Stop
