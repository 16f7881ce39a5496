"""Signs of life, and views: who is in from which round on, and what is promised before."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from .base import MAX_LAYOUTS, Address, Count, Digest, Member, Message, Name, Round, Seed, Slot, Terms, Text

__all__ = ["Alive", "Freeze", "Frozen", "Hello", "Promise", "Pulse", "ServerAlive", "View"]


class Alive(Message, tag="alive", frozen=True):
    """Worker to coordinator, at every heartbeat: rounds and plan versions by layout, and whether it is done: it has seen the END.

    `synced` says whether it has the state after the last round of every layout, and can hand it out.
    `busy` says what it does instead of training, for people; it is empty while it trains.
    `ready` asks for a place in the next view, from a worker that no view names: its script is about to train.
    `waits` are the layouts whose open round this worker has pushed all of, and waits for; none where it computes. One that has
    finished pushes EMPTY in all, and waits in all.
    `cut` are the servers that it has no connection to.
    """

    slot: Slot
    incarnation: Count
    view: Round
    layouts: Annotated[list[tuple[Count, Round, Count]], Meta(max_length=MAX_LAYOUTS)]
    synced: bool
    done: bool
    busy: Name = ""
    ready: bool = False
    waits: Annotated[list[Count], Meta(max_length=MAX_LAYOUTS)] = []
    cut: Annotated[list[Slot], Meta(max_length=256)] = []


class ServerAlive(Message, tag="server", frozen=True):
    """Server to coordinator, at every heartbeat: where it listens, its shards with their boots, and the layouts that it holds.

    `terms` are all the agreed settings as it knows them, until it has seen a view; the coordinator refuses it where they differ.
    `view` is the last one that all its shards have obeyed; one that was started again knows it from before.
    `lost` says why what the shards had stored could not be used; empty where nothing was lost.
    """

    server: Slot
    address: Address
    shards: Annotated[list[tuple[Slot, Seed]], Meta(max_length=256)]
    layouts: Annotated[list[tuple[Count, Digest]], Meta(max_length=MAX_LAYOUTS)]
    view: Round
    terms: Terms = {}
    lost: Text = ""


class Pulse(Message, tag="pulse", frozen=True):
    """Coordinator to whoever sent a sign of life: I live too."""


class View(Message, tag="view", frozen=True):
    """Coordinator to all: who is in, from which round on, and which shards count.

    Attributes:
        p: Number of the view; rounds that are finished under it carry it as their epoch.
        members: (slot, incarnation), in slot order.
        cuts: (layout, cut, previous epoch): the first round of a layout that counts under this view, and the epoch of the round
            before it (-1 where there is none). A layout that is not listed has (0, -1).
        shards: (number, boot, address) of all shards.
        restore: (number, boot) of shards that start blank.
        donor: Slot that hands parameters to who has none.
        removed: (slot, incarnation, layout, cut) of who is out.
    """

    p: Count
    members: Annotated[list[Member], Meta(max_length=4096)]
    cuts: Annotated[list[tuple[Count, Round, Round]], Meta(max_length=MAX_LAYOUTS)]
    shards: Annotated[list[tuple[Slot, Seed, Address]], Meta(max_length=65536)]
    restore: Annotated[list[tuple[Slot, Seed]], Meta(max_length=65536)]
    donor: Slot
    removed: Annotated[list[tuple[Slot, Count, Count, Round]], Meta(max_length=65536)]

    def cut_of(self, layout: int) -> tuple[int, int]:
        """Return (cut, previous epoch) of a layout."""
        return next(((cut, epoch) for number, cut, epoch in self.cuts if number == layout), (0, -1))


class Freeze(Message, tag="freeze", frozen=True):
    """Coordinator to server: promise to finish no round before a view of number `p` or higher, and say how far you are.

    To workers too where a shard has lost what it knew: they promise to decide no round.
    """

    p: Count


class Frozen(Message, tag="frozen", frozen=True):
    """Shard to coordinator: I promise. For a promise that a view has overtaken, nothing is said.

    Attributes:
        p: Number that is promised.
        shard: Who promises.
        boot: Its boot.
        epoch: Number of the last view that it obeyed; -1 before the first.
        done: (layout, round, epoch) of each layout that it holds: the last round that all its keys have finished, and the view
            under which they did; (-1, -1) before the first.
        blank: Whether it lacks what came before the rounds of that view: its boot is new, and nobody has restored it yet.
    """

    p: Count
    shard: Slot
    boot: Seed
    epoch: Round
    done: Annotated[list[tuple[Count, Round, Round]], Meta(max_length=MAX_LAYOUTS)]
    blank: bool = False


class Promise(Message, tag="promise", frozen=True):
    """Worker to coordinator: I decide no round and take over no state before a view of number `p` or higher.

    Attributes:
        p: Number that is promised.
        slot: Who promises.
        incarnation: Of the sender.
        layouts: (layout, open round, epoch of the round before, whether it has that round's results) of each layout that it is
            not behind in.
        done: Whether it has seen the END: its rounds have ended, for all.
    """

    p: Count
    slot: Slot
    incarnation: Count
    layouts: Annotated[list[tuple[Count, Round, Round, bool]], Meta(max_length=MAX_LAYOUTS)]
    done: bool = False


class Hello(Message, tag="hello", frozen=True):
    """Worker to server, and back unchanged: this connection belongs to this member."""

    slot: Slot
    incarnation: Count
