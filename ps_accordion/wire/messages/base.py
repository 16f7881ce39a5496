"""What messages consist of: the kinds of their fields, their limits, and several in one."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Raw, Struct

__all__ = [
    "MAX_ASKED",
    "MAX_BUNDLED",
    "MAX_KEPT",
    "MAX_LAYOUTS",
    "MAX_TERMS",
    "MAX_TEXT",
    "Address",
    "Bundle",
    "Count",
    "Digest",
    "Entries",
    "File",
    "Keys",
    "Member",
    "Message",
    "Name",
    "PushKind",
    "ResultKind",
    "Round",
    "Seed",
    "Slot",
    "Standings",
    "Terms",
    "Text",
]


PushKind = Literal["DATA", "UNUSED", "SKIP", "JOINED", "FLUSH", "EMPTY"]
ResultKind = Literal["DATA", "UNUSED", "SKIP", "JOIN", "END"]

MAX_TEXT = 2000
"""Characters of a reason: enough for the last line of a traceback, too little to fill a memory."""
MAX_LAYOUTS = 1024
"""Layouts of one session: signs of life list them all."""
MAX_ASKED = 256
"""Keys that one Ask or Missing may list."""
MAX_KEPT = 1026
"""Rounds of which a worker keeps its pushes: `servers.replay_rounds`, the open one, and one to spare."""
MAX_BUNDLED = 64
"""Messages that one bundle may hold. A worker or shard has a few ready at a time."""
MAX_TERMS = 128
"""Settings that all must agree on: a few dozen."""

Slot = Annotated[int, Meta(ge=0, lt=1 << 16)]
Count = Annotated[int, Meta(ge=0, lt=1 << 32)]
Round = Annotated[int, Meta(ge=-1, lt=1 << 48)]
Seed = Annotated[int, Meta(ge=0)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Name = Annotated[str, Meta(max_length=64)]
Digest = Annotated[str, Meta(min_length=16, max_length=16)]
Address = Annotated[str, Meta(max_length=256)]
Terms = Annotated[dict[Name, Text | int | float | bool], Meta(max_length=MAX_TERMS)]
File = Annotated[str, Meta(max_length=64, pattern=r"^[a-z]+(-[0-9]+)?\.[a-z]+$")]
Member = tuple[Slot, Count]
Entries = Annotated[list[tuple[Slot, float, float, float, float, float, float, float, float, float]], Meta(max_length=65536)]
Standings = Annotated[list[tuple[Count, Round, bool]], Meta(max_length=MAX_LAYOUTS)]
Keys = Annotated[list[Count], Meta(max_length=MAX_ASKED)]


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages."""


class Bundle(Message, tag="bundle", frozen=True):
    """Anybody to anybody: several messages, each with the lengths of its payload frames; `bundle.py` has their bytes."""

    parts: Annotated[list[tuple[Raw, Annotated[list[Count], Meta(max_length=17)]]], Meta(max_length=MAX_BUNDLED)]
