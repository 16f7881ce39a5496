"""Who is in the run: coming in, going out, layouts, and the account that each gives."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from .base import MAX_LAYOUTS, Count, Digest, Entries, Message, Name, Round, Seed, Slot, Terms, Text

__all__ = [
    "Abort",
    "Account",
    "Books",
    "Bye",
    "Declare",
    "Ended",
    "Fault",
    "Join",
    "Leave",
    "NewLayout",
    "Ready",
    "Refused",
    "Welcome",
]


class Join(Message, tag="join", frozen=True):
    """Worker to coordinator: let me in. `slot` -1 asks for any; `terms` are the agreed settings it was told of.

    `restart` counts how often whoever started this process has started it again: a higher number takes over the slot at once,
    because the process before it has ended.
    """

    token: Name
    slot: Annotated[int, Meta(ge=-1, lt=1 << 16)]
    terms: Terms
    restart: Count = 0


class Welcome(Message, tag="welcome", frozen=True):
    """Coordinator to worker: you are in, as `slot` of this incarnation, under these terms."""

    token: Name
    slot: Slot
    incarnation: Count
    terms: Terms


class Refused(Message, tag="refused", frozen=True):
    """Coordinator to worker or server: not in this run, for this reason."""

    token: Name
    reason: Text


class Declare(Message, tag="declare", frozen=True):
    """Worker to coordinator, with the tensor table as payload: this is the layout that I shall use."""

    slot: Slot
    incarnation: Count
    layout: Count
    digest: Digest


class Ready(Message, tag="ready", frozen=True):
    """Coordinator to worker: every member has declared this layout and every shard holds it.

    `begun` says that its rounds had begun before this worker declared it, which must take over the state of the others first.
    """

    layout: Count
    digest: Digest
    begun: bool = False


class NewLayout(Message, tag="layout", frozen=True):
    """Coordinator to server, with the tensor table as payload: hold this layout."""

    layout: Count
    digest: Digest


class Leave(Message, tag="leave", frozen=True):
    """Worker to coordinator: I am going. An empty `error` means that all is well.

    `early` says that the others go on; the same message comes back once the next coordinator would know it, too.
    `flushed` is then (layout, the round in which its residuals were handed over).
    """

    slot: Slot
    incarnation: Count
    error: Text
    code: Annotated[int, Meta(ge=0, le=255)]
    early: bool = False
    flushed: Annotated[list[tuple[Count, Round]], Meta(max_length=MAX_LAYOUTS)] = []


class Account(Message, tag="account", frozen=True):
    """Worker to coordinator, once a second and before it leaves: what its pushes have come to, for the ledger.

    Attributes:
        slot: Sender.
        incarnation: Of the sender.
        former: Incarnations that it had before: what they left behind is not lost.
        round: Last round that it has decided.
        norm: About the L2 norm of all that its residuals hold; -1 where it does not know.
        final: Whether its rounds have ended. Only then there are entries.
        whole: Whether it has seen the results of all rounds.
        measured: Whether it knows what its gradients came to.
        entries: By shard: gradients, pushes that count, residuals, lost, results, slack, noise, drift, spread.
    """

    slot: Slot
    incarnation: Count
    former: Annotated[list[Count], Meta(max_length=4096)]
    round: Round
    norm: Annotated[float, Meta(ge=-1)]
    final: bool = False
    whole: bool = True
    measured: bool = True
    entries: Entries = []


class Books(Message, tag="books", frozen=True):
    """Server to coordinator, once a second and when it hears that the run is over: what its shards counted, for the ledger.

    Attributes:
        server: Sender.
        entries: By shard: means of pushes, results, residuals, lost, sum of all pushes that count, slack, noise, drift, spread.
        norms: (shard, round, about the L2 norm of what its residuals hold after it), said once a second, without entries.
        whole: (shard, boot) of shards that lack nothing which a former self of theirs has had.
        boots: (shard, boot) of all its shards, with the entries.
    """

    server: Slot
    entries: Entries = []
    norms: Annotated[list[tuple[Slot, Round, float]], Meta(max_length=65536)] = []
    whole: Annotated[list[tuple[Slot, Seed]], Meta(max_length=65536)] = []
    boots: Annotated[list[tuple[Slot, Seed]], Meta(max_length=65536)] = []


class Ended(Message, tag="ended", frozen=True):
    """Coordinator to all: the run is over, and ended well."""


class Abort(Message, tag="abort", frozen=True):
    """Coordinator to all: the run is over because `culprit` failed."""

    culprit: Name
    reason: Text


class Bye(Message, tag="bye", frozen=True):
    """Member or server to coordinator: I know that the run is over."""

    name: Name


class Fault(Message, tag="fault", frozen=True):
    """Server to coordinator: a member broke the protocol, or this server cannot go on."""

    server: Slot
    culprit: Name
    reason: Text
