"""One shard as a state machine: pushes in, results out. It owns its keys, and nothing else touches them.

A round of a key is finished when the push of every member is in; then, in this order:

    any SKIP     -> SKIP: somebody's gradient was not finite, nothing is written
    all EMPTY    -> END: every worker has finished
    all JOINED or EMPTY -> JOIN: nobody has data left for now, nothing is written
    no DATA      -> UNUSED: nobody had a gradient, nothing is written
    else         -> total = sum of weight x D(payload) in slot order; p = total / sum of weights + residual;
                    result = C(p), new residual = p - D(result), written to the other half

The order of arrival has no influence on any bit. A result is kept until the next one, and sent again to who asks: the result is
the acknowledgement of a push. A push that comes twice is seen to be the same and counts once.

What must outlive the process is in the store before anything that tells of it is returned: a finished round before its result,
a promise before the answer, a view before what follows from it (`memory.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from typing_extensions import Buffer

from ps_accordion import crashpoints
from ps_accordion.codecs import Push as FoldPush
from ps_accordion.codecs import fold, registry
from ps_accordion.codecs.base import Coding, Payload
from ps_accordion.config import Settings
from ps_accordion.errors import CodecError, PayloadError, WireError
from ps_accordion.layout import Layout
from ps_accordion.ledger import NO_TALLY, Probe, Tally
from ps_accordion.seeds import SERVER, seed_for
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Action, Note, Peer, Send
from ps_accordion.wire.framing import join_frames

from . import accounts
from .durable import ShardStore
from .memory import ShardMemory, ShardState
from .record import NO_CODING, Finished, Held, KeyRecord, Outcome
from .restoring import Restore, bound_of, finished_of

__all__ = ["COORDINATOR", "Shard"]

COORDINATOR = "coordinator"
"""What a server calls its link to the coordinator."""
EXACT = ("dense", 32.0)
"""Codec and level of buffers: all workers must have the lead's bits."""


class Shard:
    """The keys of one shard, in every layout.

    Args:
        number: Number of the shard in the run.
        boot: Drawn when the shard's memory was empty; a view names it.
        settings: The settings of the job.
        store: Its memory, which stays the caller's: a shard that finds something there goes on from it. None takes memory that
            ends with the process.
        restore: Says what a key of a new layout goes on from; None where it begins.

    Raises:
        ConfigError: The store was written under other settings.
    """

    def __init__(
        self, number: int, boot: int, settings: Settings, *, store: ShardStore | None = None, restore: Restore | None = None
    ) -> None:
        self._restore = restore
        self.number = number
        self.boot = boot
        self.settings = settings
        self.records: dict[tuple[int, int], KeyRecord] = {}
        self.members: dict[int, int] = {}
        self.epoch = -1
        self.promise = -1
        """Number of the last view that was promised: while it is above `epoch`, no round is finished."""
        self._layouts: dict[int, Layout] = {}
        self._plans: dict[int, tuple[int, bytes]] = {}
        self._codecs = registry.suite(**settings.codec.options)
        self._probes: dict[tuple[int, int], Probe] = {}
        self._scratch = np.zeros(0, np.float32)
        self._memory = ShardMemory(store or ShardStore.open(None, shard=number, job=""), settings)
        self._state = self._memory.state()
        self._recall()

    @property
    def layouts(self) -> dict[int, Layout]:
        """The layouts whose keys it holds, by number."""
        return dict(self._layouts)

    def account(self) -> Tally:
        """Return what all pushes, results and residuals of its keys come to."""
        return accounts.closed((probe, self.records[where]) for where, probe in self._probes.items())

    def norm(self) -> tuple[int, float]:
        """Return the last round of any key, and about the norm of all residuals after it. From any thread."""
        records = list(self.records.values())
        return max((record.round for record in records), default=-1), math.hypot(*(record.norm for record in records))

    def close(self) -> None:
        """Let go of the store's memory."""
        self.records.clear()
        self._memory.close()

    def _recall(self) -> None:
        """Go on from what the store has, which may be a view that some keys had not obeyed yet."""
        state = self._state
        self.epoch, self.promise, self.members = state.epoch, state.promise, dict(state.members)
        for number, layout in self._memory.layouts.items():
            self.on_layout(number, layout)
        for (of, _), record in self.records.items():
            state.apply(of, record)
            self._memory.save(of, record)

    # ------------------------------------------------------------ what the coordinator says

    def on_layout(self, number: int, layout: Layout) -> list[Action]:
        """Hold the keys of a layout that are ours.

        Raises:
            StorageError: There is no room for their residuals.
        """
        if number not in self._layouts:
            mine = layout.keys_of_shard(self.number)
            self.records.update({(number, record.key.number): record for record in self._memory.hold(number, layout, mine)})
            crashpoints.reach("s.layout")
            self._layouts[number] = layout
            self._probes.update({(number, key.number): Probe(number, key) for key in mine if not key.buffer})
            self._take_up(number)
            largest = max((key.elements for key in mine), default=0)
            if largest > self._scratch.size:
                self._scratch = np.zeros(largest, np.float32)
        return []

    def _take_up(self, layout: int) -> None:
        """Have the keys of a new layout go on from a checkpoint, unless they have gone on since."""
        if self._restore is None:
            return
        for record in self.records_of(layout):
            restored = self._restore(layout, record.key) if record.round < 0 else None
            if restored is None or restored.round == 0:
                continue
            record.round = restored.round - 1
            if restored.residual is not None:
                record.target(1)[:] = restored.residual
            record.bound = record.bound_before = restored.bound
            probe = self._probes.get((layout, record.key.number))
            if probe is not None:
                record.tally = record.tally_before = NO_TALLY.plus(came=probe.vector(restored.residual).mass)
            record.plan = record.plan_before = restored.plan
            self._memory.save(layout, record)
            if restored.waiting_plan:
                self.on_plan(layout, restored.waiting, restored.waiting_plan)

    def records_of(self, layout: int) -> list[KeyRecord]:
        """Return the records of a layout's keys that are ours, in order."""
        return [record for (of, _), record in self.records.items() if of == layout]

    def waiting_plan(self, layout: int) -> tuple[int, bytes]:
        """Return version and bytes of the newest plan that the coordinator has sent; (0, nothing) before the first."""
        return self._plans.get(layout, (0, b""))

    def on_freeze(self, freeze: m.Freeze) -> list[Action]:
        """Promise to finish nothing before a view of that number, and say which rounds are finished."""
        if freeze.p <= self.epoch:
            return []
        if freeze.p > self.promise:
            self.promise = freeze.p
            self._write(msgspec.structs.replace(self._state, promise=freeze.p))
            crashpoints.reach("s.frozen")
        done = []
        for layout in self._layouts:
            # Where no key of a layout is ours, nothing here holds it back: the others say how far it is.
            last = min(((record.round, record.epoch) for (of, _), record in self.records.items() if of == layout), default=None)
            if last is not None:
                done.append((layout, *last))
        blank = any(self._state.is_blank(layout, record) for (layout, _), record in self.records.items())
        return [Send((COORDINATOR,), m.Frozen(freeze.p, self.number, self.boot, self.epoch, done, blank))]

    def on_view(self, view: m.View) -> list[Action]:
        """Obey a view that is newer than ours, no older than what was promised, and names our boot."""
        if view.p <= self.epoch or view.p < self.promise:
            return []
        if (self.number, self.boot) not in [(number, boot) for number, boot, _ in view.shards]:
            return []
        before, self.members = self.members, dict(view.members)
        self.epoch = view.p
        new = {slot for slot, incarnation in self.members.items() if before.get(slot) != incarnation} if before else set()
        actions: list[Action] = [Note("view", {"shard": self.number, "p": view.p, "cuts": view.cuts})]
        self._write(ShardState(view.p, self.promise, view.members, view.cuts, sorted(new), view.donor))
        crashpoints.reach("s.view")
        for (layout, _), record in self.records.items():
            self._state.apply(layout, record)
            self._memory.save(layout, record)
            record.open = {slot: held for slot, held in record.open.items() if self._is_member(held.message)}
        for (layout, _), record in list(self.records.items()):
            actions += self._try_finish(layout, record)
        return actions

    def _write(self, state: ShardState) -> None:
        self._memory.write(state)
        self._state = state

    def on_plan(self, layout: int, version: int, plan: bytes) -> list[Action]:
        """Attach a plan to the next result of key 0, unless a newer one is known."""
        if version > self._plans.get(layout, (0, b""))[0]:
            self._plans[layout] = (version, plan)
        return []

    # ------------------------------------------------------------ what workers say

    def on_push(self, peer: Peer, push: m.Push, frames: Sequence[Buffer]) -> list[Action]:
        """Take in a push; finish the round if it was the last one missing."""
        record = self.records.get((push.layout, push.key))
        if record is None or not self._is_member(push) or self._state.is_blank(push.layout, record):
            # The layout, the view or the last result has not reached us, or the sender is no member: it will ask again.
            return []
        if push.round == record.round and record.result is not None:
            return [Send((peer,), record.result.message, record.result.frames)]
        if push.round != record.round + 1:
            return []
        try:
            payload = self._checked(push, record, frames)
        except (WireError, CodecError) as error:
            return self._refuse(peer, push, str(error))
        held = record.open.get(push.slot)
        if held is None:
            record.open[push.slot] = Held(peer, push, payload)
            return self._try_finish(push.layout, record)
        if not _same(held, push, payload):
            return self._refuse(peer, push, "it has been pushed before with other bytes")
        record.open[push.slot] = Held(peer, push, held.payload)
        return self._try_finish(push.layout, record)  # nothing, unless the round was refused and the refusal was lost

    def on_ask(self, peer: Peer, ask: m.Ask) -> list[Action]:
        """Answer for every key asked after: its result if there is one, else whether the push is missing."""
        actions: list[Action] = []
        missing: list[int] = []
        if self.members.get(ask.slot) != ask.incarnation:
            return []
        for number in ask.keys:
            record = self.records.get((ask.layout, number))
            if record is None or self._state.is_blank(ask.layout, record):
                continue
            if ask.round == record.round and record.result is not None:
                actions.append(Send((peer,), record.result.message, record.result.frames))
            elif ask.round == record.round + 1:
                held = record.open.get(ask.slot)
                if held is None:
                    missing.append(number)
                else:
                    record.open[ask.slot] = held._replace(peer=peer)
                    actions += self._try_finish(ask.layout, record)  # as for a push that comes twice
        if missing:
            actions.append(Send((peer,), m.Missing(ask.layout, ask.round, missing)))
        return actions

    def on_restore(self, restore: m.Restore, frames: Sequence[Buffer]) -> list[Action]:
        """Go on after the result that a worker has kept of a key, if nothing of the key is left here."""
        result, state = restore.result, self._state
        record = self.records.get((result.layout, result.key))
        sender = self.members.get(restore.slot) == restore.incarnation
        if record is None or not sender or (restore.p, restore.boot) != (self.epoch, self.boot):
            return []
        cut, previous_epoch = state.cut_of(result.layout)
        if not state.is_blank(result.layout, record) or (result.round, result.epoch) != (cut - 1, previous_epoch):
            return []
        try:
            finished = finished_of(result, frames, record.key)
        except (WireError, CodecError) as error:
            return [Note("refused", {"culprit": f"worker {restore.slot}", "reason": str(error)})]
        record.restore(finished, bound=bound_of(result, self._codecs), version=restore.version)
        self._memory.save(result.layout, record)
        if any(state.is_blank(layout, other) for (layout, _), other in self.records.items()):
            return []
        return [Note("restored", {"shard": self.number, "layout": result.layout, "round": result.round, "slot": restore.slot})]

    def _is_member(self, push: m.Push) -> bool:
        return self.members.get(push.slot) == push.incarnation

    def _checked(self, push: m.Push, record: KeyRecord, frames: Sequence[Buffer]) -> Payload | None:
        """Return the payload, once everything in the header and the payload agrees with the layout."""
        key = record.key
        if push.used & ~key.all_used:
            raise WireError(f"used bits {push.used:#b} for a key of {len(key.slices)} slices")
        if key.buffer and push.kind in ("UNUSED", "JOINED") and push.weight:
            raise WireError(f"key {key.number} holds buffers, of which one worker's count: {push.kind} has weight 0 there")
        if push.kind != "DATA":
            if frames or push.frames or push.used:
                raise WireError(f"a push of kind {push.kind} has no payload and no used bits")
            if push.kind == "EMPTY" and push.weight:
                raise WireError(f"a push of kind EMPTY has weight 0, got {push.weight!r}")
            return None
        if push.elements != key.elements:
            raise PayloadError(f"expected {key.elements} elements, the header says {push.elements}")
        if key.buffer and (push.codec, push.level) != EXACT:
            raise WireError(f"key {key.number} holds buffers, which travel as dense at 32, got {push.codec} at {push.level!r}")
        if not push.used or push.weight <= 0:
            raise WireError(f"a push of kind DATA needs used bits and a weight, got {push.used:#b} and {push.weight!r}")
        payload = join_frames(frames, push.frames)
        coding = Coding(push.codec, push.level, push.elements, push.count, push.seed)
        codec = registry.find(self._codecs, push.codec)
        codec.check_level(push.level)
        bound, most = codec.payload_bound(push.elements, push.level), self._memory.most[push.layout, push.key]
        if bound > most:
            raise WireError(
                f"{push.codec} at {push.level!r} may take {bound} bytes, and no level of this job more than {most} for this key; "
                "give all workers the coordinator's settings"
            )
        if payload.nbytes > bound:
            raise PayloadError(f"expected at most {bound} bytes of {push.codec}, got {payload.nbytes}")
        codec.validate(payload, coding)
        return payload

    def _refuse(self, peer: Peer, push: m.Push, reason: str) -> list[Action]:
        culprit = f"worker {push.slot}"
        text = f"push of layout {push.layout}, key {push.key}, round {push.round} from {culprit} is refused: {reason}"
        return [
            Note("refused", {"culprit": culprit, "reason": text}),
            Send((peer,), m.Refuse(push.layout, push.key, push.round, text[: m.MAX_TEXT])),
        ]

    # ------------------------------------------------------------ finishing a round

    def _try_finish(self, layout: int, record: KeyRecord) -> list[Action]:
        if self.promise > self.epoch or not self.members or len(record.open) < len(self.members):
            return []
        held = [record.open[slot] for slot in sorted(record.open)]
        if len({each.message.previous_skipped for each in held}) > 1:
            return [self._refuse_all(held, f"members disagree whether round {record.round} was skipped")]
        if record.key.buffer and sum(each.message.kind == "DATA" for each in held) > 1:
            return [self._refuse_all(held, "several members pushed buffers; those of the lead alone count")]
        skipped = held[0].message.previous_skipped
        lead, current = _standing(held, record.current)
        try:
            outcome = self._outcome(layout, record, held, skipped=skipped)
        except CodecError as error:
            return [self._refuse_all(held, str(error))]
        plan = self._plan_to_attach(layout, record, outcome.kind)
        result = m.Result(
            layout, record.key.number, record.round + 1, self.epoch, outcome.kind, outcome.used, lead, *outcome.coding,
            [frame.nbytes for frame in outcome.frames], len(plan),
        )  # fmt: skip
        frames = (*outcome.frames, memoryview(plan)) if plan else outcome.frames
        record.finish(Finished(result, frames), outcome, current, skipped=skipped)
        self._memory.save(layout, record)
        crashpoints.reach("s.marked")
        notes: list[Action] = []
        if outcome.lost:
            notes.append(
                Note("loss", {"layout": layout, "key": result.key, "round": result.round, "norm": outcome.lost, "why": "switch"})
            )
        if result.key == 0:
            fields = {"layout": layout, "round": result.round, "epoch": result.epoch, "kind": result.kind, "plan": record.plan}
            notes.append(Note("round", fields | {"previous_skipped": skipped, "slots": [each.message.slot for each in held]}))
        return [*notes, Send(tuple(each.peer for each in held), result, frames)]

    def _refuse_all(self, held: list[Held], reason: str) -> Action:
        push = held[0].message
        text = f"layout {push.layout}, key {push.key}, round {push.round}: {reason}"
        return Send(tuple(each.peer for each in held), m.Refuse(push.layout, push.key, push.round, text[: m.MAX_TEXT]))

    def _plan_to_attach(self, layout: int, record: KeyRecord, kind: m.ResultKind) -> bytes:
        """Return the plan that goes with this result, or nothing; the record then knows its version."""
        version, plan = self._plans.get(layout, (0, b""))
        record.plan_before = record.plan
        if record.key.number != 0 or kind == "END" or version <= record.plan:
            return b""
        record.plan = version
        return plan

    def _outcome(self, layout: int, record: KeyRecord, held: list[Held], *, skipped: bool) -> Outcome:
        kinds = {each.message.kind for each in held}
        start = record.start(skipped=skipped)
        bound = record.bound_before if skipped else record.bound
        used = 0
        for each in held:
            used |= each.message.used
        tally = record.tally_before if skipped else record.tally
        nothing = Outcome("SKIP", used, NO_CODING, (), start, start, bound, 0.0, tally)
        if "SKIP" in kinds:
            return nothing
        if kinds == {"EMPTY"}:
            return nothing._replace(kind="END")
        if kinds <= {"EMPTY", "JOINED"}:
            return nothing._replace(kind="JOIN")
        if "DATA" not in kinds:
            return nothing._replace(kind="UNUSED")
        return self._fold(layout, record, held, nothing) or nothing

    def _fold(self, layout: int, record: KeyRecord, held: list[Held], start: Outcome) -> Outcome | None:
        """Fold the pushes of a round. None when the sum is not finite, though every push was: the round is then skipped."""
        key, codecs = record.key, self._codecs
        pushes = [FoldPush(each.message.weight, _coding(each.message), each.payload) for each in held if each.payload is not None]
        reply = registry.lightest([(push.coding.codec, push.coding.level) for push in pushes], key.elements, codecs=codecs)
        codec = codecs[reply[0]]
        bound = codec.payload_bound(key.elements, reply[1])
        residual = record.halves[start.before]
        out = np.empty(bound, np.uint8)
        total_weight = sum(each.message.weight for each in held)
        folded = fold(
            pushes,
            residual,
            record.target(start.before) if residual is not None or codec.keeps(reply[1]) else None,
            elements=key.elements,
            total_weight=total_weight,
            seed_reply=seed_for(self.settings.seed, layout, key.number, record.round + 1, SERVER),
            scratch=self._scratch[: key.elements],
            out=out,
            codecs=codecs,
            reply=reply,
            held=[(part.offset, part.length) for part in key.elements_of(start.used)],
            rule=self.settings.codec.residual_at_switch if 0 < start.bound < bound else "keep",
            hint=record.hint,
        )
        crashpoints.reach("s.half")
        if folded is None:
            return None
        after = 1 - start.before if folded.wrote else start.before
        payload = out[: folded.nbytes]
        tally = start.tally
        probe = self._probes.get((layout, key.number))
        if probe is not None:
            left = residual if after == start.before else record.halves[after]
            tally = accounts.counted(
                probe, tally, pushes, total_weight, (folded.coding, payload), (residual, left),
                codecs=codecs, unused=key.elements_of(start.used), lost=folded.lost,
            )  # fmt: skip
            record.norm = probe.norm(left)
        return Outcome("DATA", start.used, folded.coding, (payload.data,), start.before, after, bound, folded.lost, tally)


def _coding(push: m.Push) -> Coding:
    return Coding(push.codec, push.level, push.elements, push.count, push.seed)


def _standing(held: list[Held], current: frozenset[int] | None) -> tuple[int, frozenset[int]]:
    """Return the lead of a round, and the slots that have the state after it.

    The lead is the lowest slot that trains. Where none does, it is one that has the last state and can hand it out: who is JOINED
    goes on after the round, who is EMPTY does not.
    """
    kinds = {each.message.slot: each.message.kind for each in held}
    training = frozenset(slot for slot, kind in kinds.items() if kind not in ("JOINED", "EMPTY"))
    if training:
        return min(training), training
    joined = frozenset(slot for slot, kind in kinds.items() if kind == "JOINED")
    last = (current or frozenset()) & kinds.keys() or frozenset(kinds)
    return min(joined & last or last), joined or last


def _same(held: Held, push: m.Push, payload: Payload | None) -> bool:
    if held.message != push:
        return False
    return payload is None or (held.payload is not None and np.array_equal(held.payload, payload))
