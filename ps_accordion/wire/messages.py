"""The messages of the protocol, one frozen class each.

On the wire a message is a msgpack array `[tag, field, ...]` in the order of the fields below; bulk data follows in raw frames.
`framing.py` packs and unpacks them. The rules of who sends what when are in `docs/wire.md`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Raw, Struct

__all__ = [
    "Abort",
    "Account",
    "Alive",
    "Ask",
    "Books",
    "Bundle",
    "Bye",
    "Declare",
    "Ended",
    "Fault",
    "Freeze",
    "Frozen",
    "Get",
    "Heard",
    "Hello",
    "Join",
    "Kept",
    "Leave",
    "Message",
    "Missing",
    "NewLayout",
    "NewPlan",
    "Offer",
    "Promise",
    "Pulse",
    "Push",
    "PushKind",
    "Rate",
    "Ready",
    "Recall",
    "Refuse",
    "Refused",
    "Replay",
    "Report",
    "Restore",
    "Result",
    "ResultKind",
    "Save",
    "Saved",
    "ServerAlive",
    "State",
    "View",
    "Welcome",
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


# ---------------------------------------------------------------- coming in and going out


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
    """

    server: Slot
    entries: Entries = []
    norms: Annotated[list[tuple[Slot, Round, float]], Meta(max_length=65536)] = []
    whole: Annotated[list[tuple[Slot, Seed]], Meta(max_length=65536)] = []


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


# ---------------------------------------------------------------- signs of life


class Alive(Message, tag="alive", frozen=True):
    """Worker to coordinator, at every heartbeat: rounds and plan versions by layout, and whether it has seen the END.

    `synced` says whether it has the state after the last round of every layout, and can hand it out.
    `busy` says what it does instead of training, for people; it is empty while it trains.
    `ready` asks for a place in the next view, from a worker that no view names: its script is about to train.
    `waits` is the layout whose round this worker has pushed all of, and waits for; -1 where it waits for none.
    """

    slot: Slot
    incarnation: Count
    view: Round
    layouts: Annotated[list[tuple[Count, Round, Count]], Meta(max_length=MAX_LAYOUTS)]
    synced: bool
    done: bool
    busy: Name = ""
    ready: bool = False
    waits: Annotated[int, Meta(ge=-1, lt=MAX_LAYOUTS)] = -1


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
    """

    p: Count
    slot: Slot
    incarnation: Count
    layouts: Annotated[list[tuple[Count, Round, Round, bool]], Meta(max_length=MAX_LAYOUTS)]


class Hello(Message, tag="hello", frozen=True):
    """Worker to server, and back unchanged: this connection belongs to this member."""

    slot: Slot
    incarnation: Count


# ---------------------------------------------------------------- rounds


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
    """Shard to worker: push these again."""

    layout: Count
    round: Round
    keys: Keys


class Refuse(Message, tag="refuse", frozen=True):
    """Shard to worker: this push breaks the protocol; the run cannot go on with it."""

    layout: Count
    key: Count
    round: Round
    reason: Text


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
