"""Rounds: pushes and their results, who asks for what again, and how a blank shard gets back what it knew."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from .base import MAX_ASKED, MAX_KEPT, Count, Keys, Member, Message, Name, PushKind, ResultKind, Round, Seed, Slot, Text

__all__ = ["Ask", "Missing", "Offer", "Push", "Recall", "Refuse", "Replay", "Restore", "Result"]


class Push(Message, tag="push", frozen=True):
    """Worker to shard: this member's part of one key in one round. DATA carries its payload in `frames`, FLUSH if there is one.

    Attributes:
        layout: Number of the layout.
        key: Number of the key.
        round: Number of the round.
        slot: Sender.
        incarnation: Of the sender.
        kind: DATA, UNUSED (its weight counts, nothing to add), SKIP (not finite), JOINED (this worker waits for the others to
            come to the end of their data; its weight may count), FLUSH (this worker is about to leave: its residual, as dense
            at 32, or nothing where it has none), EMPTY (this worker has finished).
        weight: What its payload counts for; 0 when EMPTY.
        used: Bit i is set when slice i of the key has a gradient here.
        previous_skipped: Whether the round before was skipped.
        codec: Wire name of the codec ("" unless DATA).
        level: Its setting.
        elements: Length of the key's vector.
        count: Entries in the payload.
        seed: Shared counter seed, or 0.
        frames: Length of each payload frame that follows.
    """

    layout: Count
    key: Count
    round: Round
    slot: Slot
    incarnation: Count
    kind: PushKind
    weight: Annotated[float, Meta(ge=0, le=1e9)]
    used: Count
    previous_skipped: bool
    codec: Name = ""
    level: float = 0.0
    elements: Count = 0
    count: Count = 0
    seed: Seed = 0
    frames: Annotated[list[Count], Meta(max_length=16)] = []


class Result(Message, tag="result", frozen=True):
    """Shard to every member: the answer to their pushes. DATA carries its payload in `frames`.

    Attributes:
        layout: Number of the layout.
        key: Number of the key.
        round: Number of the round.
        epoch: View under which the round of this key was finished.
        kind: DATA, UNUSED (no member had a gradient), SKIP (somebody's was not finite), JOIN (all wait for each other, or have
            finished), END (all have finished).
        used: Bit i is set when some member had a gradient for slice i.
        lead: The lowest slot that still trains: not JOINED, FLUSH or EMPTY. Where there is none, a slot that has the last state:
            the lowest that is JOINED and trained in the round before (or was JOINED, if that was a JOIN); where all that did
            are EMPTY, the lowest of them.
        codec: Wire name of the codec ("" unless DATA).
        level: Its setting.
        elements: Length of the key's vector.
        count: Entries in the payload.
        seed: Shared counter seed, or 0.
        frames: Length of each payload frame that follows.
        plan: Length of the plan, a frame behind the payload's; 0 where there is none. Only key 0 carries plans.
    """

    layout: Count
    key: Count
    round: Round
    epoch: Count
    kind: ResultKind
    used: Count
    lead: Slot = 0
    codec: Name = ""
    level: float = 0.0
    elements: Count = 0
    count: Count = 0
    seed: Seed = 0
    frames: Annotated[list[Count], Meta(max_length=16)] = []
    plan: Count = 0


class Restore(Message, tag="restore", frozen=True):
    """Worker to a shard that a view names as blank: the last result of one key, with that result's frames.

    Attributes:
        p: Number of the view.
        boot: Of the shard.
        slot: Sender.
        incarnation: Of the sender.
        version: Of the plan in force after that round.
        result: As that shard's former self gave it.
    """

    p: Count
    boot: Seed
    slot: Slot
    incarnation: Count
    version: Count
    result: Result


class Offer(Message, tag="offer", frozen=True):
    """Worker to a shard that a view names as blank, where `servers.replay_rounds` is set: of these rounds I keep my pushes.

    Attributes:
        p: Number of the view.
        boot: Of the shard.
        slot: Sender.
        incarnation: Of the sender.
        layout: Number of the layout.
        rounds: (round, epoch) of each, in order; epoch -1 where this worker has not decided it.
        views: (epoch, members) of the views under which those rounds were finished, as far as the sender knows them.
    """

    p: Count
    boot: Seed
    slot: Slot
    incarnation: Count
    layout: Count
    rounds: Annotated[list[tuple[Round, Round]], Meta(max_length=MAX_KEPT)] = []
    views: Annotated[list[tuple[Count, Annotated[list[Member], Meta(max_length=4096)]]], Meta(max_length=MAX_KEPT)] = []


class Recall(Message, tag="recall", frozen=True):
    """Blank shard to worker: send me these of the pushes that you have offered, as (key, round)."""

    layout: Count
    wanted: Annotated[list[tuple[Count, Round]], Meta(max_length=MAX_ASKED)]


class Replay(Message, tag="replay", frozen=True):
    """Worker to a blank shard: what I pushed in a round that is over, with that push's frames, and what came of it.

    Attributes:
        boot: Of the shard.
        push: As it was.
        kind: Of the result by which the round was decided here; empty where it was not.
        digest: xxh3-64 of that result's payload, all frames together; 0 where it has none.
    """

    boot: Seed
    push: Push
    kind: ResultKind | Literal[""] = ""
    digest: Seed = 0


class Ask(Message, tag="ask", frozen=True):
    """Worker to shard: I have no result for these keys; which of my pushes do you lack?"""

    layout: Count
    round: Round
    slot: Slot
    incarnation: Count
    keys: Keys


class Missing(Message, tag="missing", frozen=True):
    """Shard to worker: push these again.

    Attributes:
        layout: Number of the layout.
        round: The open round.
        keys: Those that it lacks.
        held: Those of the keys asked after that it holds, and waits for other workers to push.
    """

    layout: Count
    round: Round
    keys: Keys
    held: Keys = []


class Refuse(Message, tag="refuse", frozen=True):
    """Shard to worker: this push breaks the protocol; the run cannot go on with it."""

    layout: Count
    key: Count
    round: Round
    reason: Text
