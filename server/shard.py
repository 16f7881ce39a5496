"""One shard as a state machine: pushes in, results out. It owns its keys, and nothing else touches them.

A round of a key is finished when the push of every member is in; then, in this order:

    any SKIP     -> SKIP: somebody's gradient was not finite, nothing is written
    all EMPTY    -> END: every worker has finished
    all JOINED or EMPTY -> JOIN: nobody has data left for now, nothing is written
    no DATA      -> UNUSED: nobody had a gradient, nothing is written; what a FLUSH brings goes into the residual
    else         -> total = sum of weight x D(payload) in slot order; p = total / sum of weights + residual;
                    result = C(p), new residual = p - D(result), written to the other half

The order of arrival has no influence on any bit. A result is kept until the next one, and sent again to who asks: the result is
the acknowledgement of a push. A push that comes twice is seen to be the same and counts once.

What must outlive the process is in the store before anything that tells of it is returned: a finished round before its result,
a promise before the answer, a view before what follows from it (`memory.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
from typing_extensions import Buffer

from ps_accordion import crashpoints
from ps_accordion.codecs.base import Payload
from ps_accordion.codecs.cache import meet
from ps_accordion.config import Settings
from ps_accordion.errors import CodecError, WireError
from ps_accordion.layout import Key, Layout
from ps_accordion.ledger import Tally
from ps_accordion.telemetry.trace import Trace, now
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Action, Note, Peer, Send
from ps_accordion.wire.lane import Loan

from . import accounts
from .checking import checked, same, standing, unfit
from .durable import ShardStore, Snapshots
from .folding import Folds
from .memory import ShardMemory, ShardState
from .record import Finished, Held, KeyRecord, Outcome
from .replaying import Base, Replays, Result
from .restoring import Restore, base_of, bound_of, finished_of

__all__ = ["COORDINATOR", "Shard"]

COORDINATOR = "coordinator"
"""What a server calls its link to the coordinator."""


class Shard:
    """The keys of one shard, in every layout.

    Args:
        number: Number of the shard in the run.
        boot: Drawn when the shard's memory was empty; a view names it.
        settings: The settings of the job.
        store: Its memory, which stays the caller's: a shard that finds something there goes on from it. None takes memory that
            ends with the process.
        restore: Says what a key of a new layout goes on from; None where it begins.
        snapshots: Copies of its residuals that outlive its memory, which stay the caller's; None keeps none.
        trace: Where to note what takes how long; None for nowhere.
        take: Returns memory that workers read payloads from, of so many bytes; None where they do not.

    Raises:
        ConfigError: The store was written under other settings.
    """

    def __init__(
        self,
        number: int,
        boot: int,
        settings: Settings,
        *,
        store: ShardStore | None = None,
        restore: Restore | None = None,
        snapshots: Snapshots | None = None,
        trace: Trace | None = None,
        take: Callable[[int], Payload | None] = lambda nbytes: None,
    ) -> None:
        self._restore = restore
        self._trace = trace or Trace()
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
        self._folds = Folds(settings, take)
        self._memory = ShardMemory(store or ShardStore.open(None, shard=number, job=""), settings)
        self._state = self._memory.state()
        self._replays = Replays(settings, snapshots, self._begins, self._folding)
        self._recall()

    @property
    def layouts(self) -> dict[int, Layout]:
        """The layouts whose keys it holds, by number."""
        return dict(self._layouts)

    def account(self) -> Tally:
        """Return what all pushes, results and residuals of its keys come to."""
        return accounts.closed((probe, self.records[where]) for where, probe in self._folds.probes.items())

    def norm(self) -> tuple[int, float]:
        """Return the last round of any key, and about the norm of all residuals after it. From any thread."""
        records = list(self.records.values())
        return max((record.round for record in records), default=-1), math.hypot(*(record.norm for record in records))

    @property
    def whole(self) -> bool:
        """Whether its keys lack nothing that a former self of it has had. From any thread."""
        state, layouts = self._state, self._layouts
        known = state.epoch >= 0 and not state.anew and all(layout in layouts for layout, cut, _ in state.cuts if cut)
        blank = any(state.is_blank(layout, record) for (layout, _), record in list(self.records.items()))
        # That a residual is lost is written before its key goes on, so what was not written until now is not so.
        return known and not blank and self._state is state

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
            self._look(of, record)

    # ------------------------------------------------------------ what the coordinator says

    def on_layout(self, number: int, layout: Layout) -> list[Action]:
        """Hold the keys of a layout that are ours.

        Raises:
            StorageError: There is no room for their residuals.
        """
        if number not in self._layouts:
            mine = layout.keys_of_shard(self.number)
            meet(sum(key.elements for key in layout.keys))
            self.records.update({(number, record.key.number): record for record in self._memory.hold(number, layout, mine)})
            crashpoints.reach("s.layout")
            self._layouts[number] = layout
            self._folds.hold(number, mine)
            self._replays.hold(number, mine)
            self._take_up(number)
        return []

    def _take_up(self, layout: int) -> None:
        """Have the keys of a new layout go on from a checkpoint, unless they have gone on since."""
        if self._restore is None:
            return
        for record in self.records_of(layout):
            restored = self._restore(layout, record.key) if record.round < 0 else None
            if restored is None or restored.round == 0:
                continue
            base = base_of(self._folds.probes.get((layout, record.key.number)), restored)
            record.round = base.round - 1
            if base.residual is not None:
                record.target(1)[:] = base.residual
            record.bound = record.bound_before = base.bound
            record.tally = record.tally_before = base.tally
            record.plan = record.plan_before = restored.plan
            self._memory.save(layout, record)
            self._look(layout, record)
            if restored.waiting_plan:
                self.on_plan(layout, restored.waiting, restored.waiting_plan)

    def _look(self, layout: int, record: KeyRecord) -> None:
        """Note about how long the residual is with which a key goes on."""
        probe = self._folds.probes.get((layout, record.key.number))
        if probe is not None:
            record.norm = probe.norm(record.halves[record.after])

    def _begins(self, layout: int, key: Key) -> Base:
        """Return what a key has before its first round."""
        return base_of(self._folds.probes.get((layout, key.number)), self._restore(layout, key) if self._restore else None)

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
        return [Send((COORDINATOR,), m.Frozen(freeze.p, self.number, self.boot, self.epoch, done, self._blank))]

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
        self._write(ShardState(view.p, self.promise, view.members, view.cuts, sorted(new), view.donor, self._state.anew))
        self._replays.forget()
        crashpoints.reach("s.view")
        for (layout, _), record in self.records.items():
            self._state.apply(layout, record)
            self._memory.save(layout, record)
            record.open = {slot: held for slot, held in record.open.items() if self._is_member(held.message)}
        for (layout, _), record in list(self.records.items()):
            actions += self._try_finish(layout, record)
        return actions

    def lacks(self, layouts: Sequence[int]) -> bool:
        """Whether it has yet to hear of the run, or of some of these layouts, or has yet to get back what it has had of a key."""
        return self.epoch < 0 or not self._layouts.keys() >= set(layouts) or self._blank

    @property
    def _blank(self) -> bool:
        return any(self._state.is_blank(layout, record) for (layout, _), record in self.records.items())

    def _write(self, state: ShardState) -> None:
        self._memory.write(state)
        self._state = state

    def on_plan(self, layout: int, version: int, plan: bytes) -> list[Action]:
        """Attach a plan to the next result of key 0, unless a newer one is known."""
        if version > self._plans.get(layout, (0, b""))[0]:
            self._plans[layout] = (version, plan)
        return []

    # ------------------------------------------------------------ what workers say

    def on_push(self, peer: Peer, push: m.Push, frames: Sequence[Buffer], loan: Loan | None = None) -> list[Action]:
        """Take in a push; finish the round if it was the last one missing.

        Args:
            peer: Who has sent it.
            push: The push.
            frames: Its payload. Memory that the sender lends must stand until the round is finished.
            loan: Of that memory; None where it is ours.
        """
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
            if loan is not None and not loan.verified():
                return []  # too late, as good as lost
        except (WireError, CodecError) as error:
            return self._refuse(peer, push, str(error))
        held = record.open.get(push.slot)
        if held is None:
            record.open[push.slot] = Held(peer, push, payload)
            return self._try_finish(push.layout, record)
        if not same(held, push, payload):
            return self._refuse(peer, push, "it has been pushed before with other bytes")
        record.open[push.slot] = Held(peer, push, held.payload)
        return self._try_finish(push.layout, record)  # nothing, unless the round was refused and the refusal was lost

    def on_ask(self, peer: Peer, ask: m.Ask) -> list[Action]:
        """Answer for every key asked after: its result if there is one, else whether the push is missing or held."""
        actions: list[Action] = []
        missing: list[int] = []
        holds: list[int] = []
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
                    answers = self._try_finish(ask.layout, record)  # as for a push that comes twice
                    actions += answers
                    if not answers:
                        holds.append(number)
        if missing or holds:
            actions.append(Send((peer,), m.Missing(ask.layout, ask.round, missing, holds)))
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
            finished = finished_of(result, frames, record.key, self._folds.codecs_of(record.key))
        except (WireError, CodecError) as error:
            return [Note("refused", {"culprit": f"worker {restore.slot}", "reason": str(error)})]
        kept = Result(finished, bound_of(result, self._folds.codecs_of(record.key)), restore.version)
        self._replays.result(result.layout, result.key, kept)
        return self._go_on(result.layout)

    def on_offer(self, peer: Peer, offer: m.Offer) -> list[Action]:
        """Take in which rounds a worker has kept; ask for those by which a lost residual can be made again."""
        sender = self.members.get(offer.slot) == offer.incarnation
        if offer.layout not in self._layouts or not sender or (offer.p, offer.boot) != (self.epoch, self.boot):
            return []
        self._replays.offer(peer, offer)
        return self._go_on(offer.layout)

    def on_replay(self, peer: Peer, replay: m.Replay, frames: Sequence[Buffer]) -> list[Action]:
        """Take in a push of a round that is over."""
        push = replay.push
        record = self.records.get((push.layout, push.key))
        if record is None or replay.boot != self.boot or not self._state.is_blank(push.layout, record):
            return []
        try:
            payload = self._checked(push, record, frames)
        except (WireError, CodecError) as error:
            return [Note("refused", {"culprit": f"worker {push.slot}", "reason": str(error)})]
        self._replays.push(peer, replay, payload)
        return self._go_on(push.layout, ask=False)

    def _go_on(self, layout: int, *, ask: bool = True) -> list[Action]:
        """Have blank keys go on for which all is there, with or without their residuals; ask for what is missing."""
        state, moved = self._state, list[int]()
        cut, _ = state.cut_of(layout)
        blank = [record for record in self.records_of(layout) if state.is_blank(layout, record)]
        while ready := list(self._replays.ready(layout, blank, cut, self.members)):
            for record, kept, again in ready:
                self._restored(layout, record, kept, again)
                blank.remove(record)
                moved.append(record.key.number)
        actions: list[Action] = [*self._replays.notes(), *self._replays.news(layout, cut, moved)]
        if ask or actions:
            actions += self._replays.recalls(layout, blank, cut, self.members)
        if moved and not self._blank:
            fields = {"shard": self.number, "layout": layout, "round": cut - 1, "whole": not self._state.anew}
            actions.append(Note("restored", fields))
        return actions

    def _restored(self, layout: int, record: KeyRecord, kept: Result, again: KeyRecord | None) -> None:
        if again is None and not self._state.anew:
            self._write(msgspec.structs.replace(self._state, anew=True))
        record.restore(kept.finished, bound=kept.bound, version=kept.version, again=again)
        if again is None:
            self._replays.begun_anew(layout, record)
        self._memory.save(layout, record)
        self._look(layout, record)

    def _is_member(self, push: m.Push) -> bool:
        return self.members.get(push.slot) == push.incarnation

    def _checked(self, push: m.Push, record: KeyRecord, frames: Sequence[Buffer]) -> Payload | None:
        codecs = self._folds.codecs_of(record.key)
        return checked(push, frames, record.key, codecs=codecs, most=self._memory.most[push.layout, push.key])

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
        record.let_go()
        held = [record.open[slot] for slot in sorted(record.open)]
        if len({each.message.previous_skipped for each in held}) > 1:
            return [self._refuse_all(held, f"members disagree whether round {record.round} was skipped")]
        if record.key.buffer and sum(each.message.kind == "DATA" for each in held) > 1:
            return [self._refuse_all(held, "several members pushed buffers; those of the lead alone count")]
        skipped = held[0].message.previous_skipped
        lead, current = standing(held, record.current)
        began = now()
        try:
            outcome = self._outcome(layout, record, held, skipped=skipped)
        except CodecError as error:
            return [self._refuse_all(held, str(error))]
        if outcome.kind == "SKIP" and (refused := self._refuse_unfit(record, held)):
            return refused
        folded = self._done("fold", began, layout, record.key.number, record.round + 1)
        plan = self._plan_to_attach(layout, record, outcome.kind)
        result = m.Result(
            layout, record.key.number, record.round + 1, self.epoch, outcome.kind, outcome.used, lead, *outcome.coding,
            [frame.nbytes for frame in outcome.frames], len(plan),
        )  # fmt: skip
        frames = (*outcome.frames, memoryview(plan)) if plan else outcome.frames
        record.finish(Finished(result, frames), outcome, current, skipped=skipped)
        self._memory.save(layout, record)
        self._done("store", folded, layout, result.key, result.round)
        crashpoints.reach("s.marked")
        self._replays.finished(layout, record)
        notes: list[Action] = []
        if outcome.lost:
            notes.append(
                Note("loss", {"layout": layout, "key": result.key, "round": result.round, "norm": outcome.lost, "why": "switch"})
            )
        if result.key == 0:
            fields = {"layout": layout, "round": result.round, "epoch": result.epoch, "kind": result.kind, "plan": record.plan}
            notes.append(Note("round", fields | {"previous_skipped": skipped, "slots": [each.message.slot for each in held]}))
        return [*notes, Send(tuple(each.peer for each in held), result, frames)]

    def _refuse_unfit(self, record: KeyRecord, held: list[Held]) -> list[Action]:
        """Refuse the pushes because of which a sum is not finite, if it is theirs: the round then goes on without them."""
        actions = list[Action]()
        for each, reason in unfit(held, self._folds.codecs_of(record.key)):
            del record.open[each.message.slot]
            actions += self._refuse(each.peer, each.message, reason)
        return actions

    def _done(self, name: str, began: int, layout: int, key: int, round_: int) -> int:
        """Note in the trace what was done for a round of a key; return when it was."""
        self._trace.span(name, began, layout=layout, key=key, round=round_)
        return now()

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

    def _folding(self, layout: int, record: KeyRecord, held: list[Held], skipped: bool) -> Outcome:
        return self._outcome(layout, record, held, skipped=skipped)

    def _outcome(self, layout: int, record: KeyRecord, held: list[Held], *, skipped: bool) -> Outcome:
        return self._folds.outcome(layout, record, held, skipped=skipped)
