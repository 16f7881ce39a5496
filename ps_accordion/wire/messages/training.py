"""What goes beside the rounds: state of the model, statistics and plans, checkpoints."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from .base import MAX_LAYOUTS, Count, Digest, File, Message, Name, Round, Slot, Standings, Text

__all__ = ["Get", "Heard", "Kept", "NewPlan", "Rate", "Report", "Save", "Saved", "State"]


# ---------------------------------------------------------------- state of the model


class Get(Message, tag="get", frozen=True):
    """Joiner to a server, which asks the donor: send me a part of the state after the join of `round`; -1 is the start."""

    slot: Slot
    incarnation: Count
    donor: Slot
    layout: Count
    round: Round
    part: Count


class State(Message, tag="state", frozen=True):
    """Donor to a server, which passes it on to all who asked; the part's bytes are the payload."""

    layout: Count
    round: Round
    part: Count
    parts: Count
    digest: Digest
    frames: Annotated[list[Count], Meta(max_length=1)] = []


# ---------------------------------------------------------------- statistics and plans


class Report(Message, tag="report", frozen=True):
    """Worker to coordinator, with float32 norms a tensor as payload: what one window looked like here."""

    slot: Slot
    incarnation: Count
    layout: Count
    window: Count
    round: Round
    rate: float
    loss: float


class Heard(Message, tag="heard", frozen=True):
    """Coordinator to worker: the report of this window has arrived."""

    layout: Count
    window: Count


class Rate(Message, tag="rate", frozen=True):
    """Worker to coordinator: from this round on I use this learning rate."""

    slot: Slot
    incarnation: Count
    layout: Count
    round: Round
    rate: float


class NewPlan(Message, tag="plan", frozen=True):
    """Coordinator to the server with key 0, with the plan as payload: attach it to the next result."""

    layout: Count
    version: Count


# ---------------------------------------------------------------- checkpoints


class Saved(Message, tag="saved", frozen=True):
    """Worker or shard to coordinator: my part of a checkpoint is on the disk, or cannot be.

    Attributes:
        shard: Whether a shard says so.
        number: Slot of the worker, or number of the shard.
        incarnation: Of the worker; 0 for a shard.
        step: Of the checkpoint.
        layouts: (layout, open round, whether the round before was skipped) of each layout.
        parts: (name, bytes, xxh3-128) of the files.
        error: Why there is none.
        attempt: How often one was tried at this step before.
    """

    shard: bool
    number: Slot
    incarnation: Count
    step: Count
    layouts: Standings
    parts: Annotated[list[tuple[File, Annotated[int, Meta(ge=0)], Name]], Meta(max_length=MAX_LAYOUTS + 8)] = []
    error: Text = ""
    attempt: Count = 0


class Save(Message, tag="save", frozen=True):
    """Coordinator to servers: all workers stand here; write the residuals of your shards for the checkpoint of this step.

    `attempt` counts how often one was tried at this step before.
    """

    step: Count
    layouts: Standings
    attempt: Count = 0


class Kept(Message, tag="kept", frozen=True):
    """Coordinator to workers: the checkpoint of this step is complete, or was given up for `error`.

    Attributes:
        step: Of the checkpoint.
        path: Where it is.
        nbytes: Its size in bytes.
        error: Why there is none; empty where there is.
        attempt: That of the part which this answers.
    """

    step: Count
    path: Text
    nbytes: Annotated[int, Meta(ge=0)]
    error: Text = ""
    attempt: Count = 0
