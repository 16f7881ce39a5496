"""Makes the residuals again that a shard's memory has lost: a copy of an earlier round, and the pushes since, folded once more.

    copy of the residual from which round s starts  ──fold the pushes of s──> ... ──fold those of cut - 1──> what was lost

Folding is the same to the bit whenever it is done, so what comes out is what was lost, and its account with it. Each round's
result is compared with the one that workers decided by. Where one differs, where a member of those rounds is gone, or where they
are more than workers have kept, there is no replay, and the residual is lost.

A copy is of a residual *as the start of a fold*: whoever pushed for that round had decided the one before, so no view undoes it.
There are two, `servers.replay_rounds` / 2 rounds apart: where the newer one is of the very round with which all go on, the state
before that, which a view may still ask for, comes from the older one. A round that a view takes back is made again from the same
residual, so its copy stands. Only where all who had decided the round before are gone is that made again, too: then a copy of
less than the newest one's round is due at once, and one of more, behind it, is of what has been taken back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import xxhash

from ps_accordion.codecs.base import FloatVector, Payload
from ps_accordion.config import Settings
from ps_accordion.errors import CodecError
from ps_accordion.layout import Key
from ps_accordion.ledger import NO_TALLY, Tally
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Note, Peer, Send

from .durable import Copies, Snapshots
from .record import Finished, Held, KeyRecord, Outcome

__all__ = ["Base", "Replays", "Result"]

AT_ONCE = 8
"""Keys whose pushes are asked for at a time: what they have pushed in all those rounds must fit into memory."""

Folding = Callable[[int, KeyRecord, list[Held], bool], Outcome]
"""Layout, record, the pushes of one round in slot order, and whether the round before was skipped, to what the round comes to."""


class Base(NamedTuple):
    """A residual from which folds can be made again.

    Attributes:
        round: The round whose fold starts from it.
        bound: Size in bytes of the bound of the reply before.
        tally: The key's account up to there.
        anew: Whether the key begins there, because what was before is lost.
        residual: float32[elements], only read; None where it is zero.
    """

    round: int
    bound: int = 0
    tally: Tally = NO_TALLY
    anew: bool = False
    residual: FloatVector | None = None

    def header(self) -> bytes:
        """Return all but the residual, as bytes."""
        return msgspec.msgpack.encode((self.round, self.bound, self.tally, self.anew))


class Result(NamedTuple):
    """The last result of a key, from a worker: what it goes on after, with or without its residual."""

    finished: Finished
    bound: int
    version: int


class _Pushed(NamedTuple):
    held: Held
    kind: str
    digest: int


class _Reach(NamedTuple):
    """Which rounds can be folded again: all from `first` to the cut, by these members; and why not the one before."""

    first: int
    members: dict[int, tuple[tuple[int, int], ...]]
    why: str


class Replays:
    """What is known of the keys that a shard has lost, until each goes on.

    Args:
        settings: The settings of the job.
        snapshots: Copies that are there still; None where there are none.
        begins: What a key begins with, before its first round.
        folding: Folds one round.
    """

    def __init__(
        self, settings: Settings, snapshots: Snapshots | None, begins: Callable[[int, Key], Base], folding: Folding
    ) -> None:
        self._rounds = settings.servers.replay_rounds
        self._every = max(1, self._rounds // 2)
        self._snapshots = snapshots
        self._begins = begins
        self._folding = folding
        self._copies: dict[tuple[int, int], Copies] = {}
        self._newest: dict[tuple[int, int], int] = {}
        """Round of the newest copy of each key that has one."""
        self._results: dict[tuple[int, int], Result] = {}
        self._offers: dict[int, dict[int, tuple[Peer, m.Offer]]] = {}
        self._asked: dict[tuple[int, int], set[tuple[int, int]]] = {}
        """Key and round of what was asked for, by layout and slot, since the last offer from there."""
        self._pushes: dict[tuple[int, int], dict[tuple[int, int, int], _Pushed]] = {}
        self._bases: dict[tuple[int, int], list[Base]] = {}
        self._differing: set[tuple[int, int]] = set()
        """Keys of which a replay came to another result than workers had."""
        self._notes: list[Note] = []

    @property
    def wanted(self) -> bool:
        """Whether workers keep what a replay needs."""
        return self._rounds > 0

    # ------------------------------------------------------------ while all is well

    def hold(self, layout: int, keys: Sequence[Key]) -> None:
        """Make room for copies of a layout's keys.

        Raises:
            ConfigError: The directory for copies is not ours to write, or holds another job's.
            StorageError: There is no room.
        """
        if self._snapshots is not None and keys:
            copies = self._snapshots.hold(layout, [key.elements for key in keys])
            for key, each in zip(keys, copies, strict=True):
                self._copies[layout, key.number] = each
                for base in _bases(each)[:1]:
                    self._newest[layout, key.number] = base.round

    def finished(self, layout: int, record: KeyRecord) -> None:
        """Keep a copy of what the round started from that was just finished, if one is due."""
        where = (layout, record.key.number)
        copies, newest = self._copies.get(where), self._newest.get(where, math.inf)
        if copies is None or record.round == newest:
            return
        if record.round % self._every == 0 or record.round < newest:
            half = record.halves[record.before]
            base = Base(record.round, record.bound_before, record.tally_before)
            copies.keep(base.header(), b"" if half is None else half.data)
            self._newest[where] = base.round

    def begun_anew(self, layout: int, record: KeyRecord) -> None:
        """Note that what a key had is lost: copies of it are of no use any more."""
        where = (layout, record.key.number)
        copies, base = self._copies.get(where), Base(record.round + 1, record.bound, anew=True)
        if copies is not None:
            for _ in range(2):
                copies.keep(base.header())
            self._newest[where] = base.round

    # ------------------------------------------------------------ what workers say to a blank shard

    def forget(self) -> None:
        """Note that there is another view, for which all is said again. Pushes stay: they are what they were."""
        self._results, self._offers, self._asked, self._bases = {}, {}, {}, {}
        self._differing = set()

    def result(self, layout: int, key: int, result: Result) -> None:
        """Take in the last result of a key."""
        self._results.setdefault((layout, key), result)

    def offer(self, peer: Peer, offer: m.Offer) -> None:
        """Take in which rounds a worker has kept. What it has been asked for and has not come may be lost: it is asked again."""
        self._offers.setdefault(offer.layout, {})[offer.slot] = (peer, offer)
        self._asked.pop((offer.layout, offer.slot), None)

    def push(self, peer: Peer, replay: m.Replay, payload: Payload | None) -> None:
        """Take in a push of a round that is over; it has been validated."""
        push = replay.push
        pushes = self._pushes.setdefault((push.layout, push.key), {})
        pushes[push.round, push.slot, push.incarnation] = _Pushed(Held(peer, push, payload), replay.kind, replay.digest)

    # ------------------------------------------------------------ what follows from it

    def ready(
        self, layout: int, blank: Iterable[KeyRecord], cut: int, members: Mapping[int, int]
    ) -> Iterator[tuple[KeyRecord, Result, KeyRecord | None]]:
        """Yield the keys that can go on: record, last result, and a record with what was lost; None where that stays lost.

        Args:
            layout: Number of the layout.
            blank: The keys that lack what was before the cut.
            cut: The round with which the view's rounds go on.
            members: Of the view.
        """
        if not self.wanted:
            for record in blank:
                result = self._results.pop((layout, record.key.number), None)
                if result is not None:
                    yield record, result, None
            return
        reach = self._reach(layout, cut, members)
        if reach is None:
            return
        for record in list(blank)[:AT_ONCE]:
            where = (layout, record.key.number)
            result = self._results.get(where)
            if result is None:
                continue
            for base in list(self._candidates(layout, record.key, cut, reach)):
                if self._missing(where, base, cut, reach):
                    break
                again = self._replayed(layout, record.key, base, cut, reach)
                if again is not None:
                    self._drop(where)
                    yield record, result, again
                    break
                self._bases[where] = [each for each in self._bases[where] if each is not base]
                self._differing.add(where)
            else:
                self._notes.append(_note("begins anew", layout, record.key, why=self._why(where, cut, reach)))
                self._drop(where)
                yield record, result, None

    def notes(self) -> list[Note]:
        """Return what is to be logged since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def news(self, layout: int, cut: int, keys: Sequence[int]) -> list[Send]:
        """Return what tells workers that keys go on: they ask seldom after a key that has been silent for long.

        Args:
            layout: Number of the layout.
            cut: The round with which they go on, of which their pushes are missing.
            keys: Their numbers; none where nothing has changed.
        """
        peers = tuple(peer for peer, _ in self._offers.get(layout, {}).values())
        parts = [list(keys[start : start + m.MAX_ASKED]) for start in range(0, len(keys), m.MAX_ASKED)] if peers else []
        return [Send(peers, m.Missing(layout, cut, part)) for part in parts]

    def recalls(self, layout: int, blank: Iterable[KeyRecord], cut: int, members: Mapping[int, int]) -> list[Send]:
        """Return what to ask workers for that has not been asked since they offered; the arguments are those of `ready`."""
        reach = self._reach(layout, cut, members)
        if reach is None:
            return []
        wanted: dict[int, list[tuple[int, int]]] = {}
        for record in list(blank)[:AT_ONCE]:
            base = next(iter(self._candidates(layout, record.key, cut, reach)), None)
            if base is not None:
                for round_, slot in self._missing((layout, record.key.number), base, cut, reach):
                    asked, push = self._asked.setdefault((layout, slot), set()), (record.key.number, round_)
                    if push not in asked:
                        asked.add(push)
                        wanted.setdefault(slot, []).append(push)
        offers = self._offers.get(layout, {})
        return [
            Send((offers[slot][0],), m.Recall(layout, pushes[start : start + m.MAX_ASKED]))
            for slot, pushes in sorted(wanted.items())
            for start in range(0, len(pushes), m.MAX_ASKED)
        ]

    def _drop(self, where: tuple[int, int]) -> None:
        """Let go of what is known of a key that goes on."""
        self._results.pop(where, None)
        self._pushes.pop(where, None)
        self._bases.pop(where, None)
        self._differing.discard(where)

    def _why(self, where: tuple[int, int], cut: int, reach: _Reach) -> str:
        """Return why there is no replay of a key."""
        if where in self._differing:
            return "a replay comes to another result than workers had"
        if reach.first == cut:
            return reach.why
        return f"there is no copy of round {reach.first} to {cut - 1}, and {reach.why}"

    def _reach(self, layout: int, cut: int, members: Mapping[int, int]) -> _Reach | None:
        """Return which rounds can be folded again; None as long as some member has not said what it has kept."""
        offers = {slot: offer for slot, (_, offer) in self._offers.get(layout, {}).items()}
        if offers.keys() != members.keys():
            return None
        views = {epoch: tuple(sorted(who)) for offer in offers.values() for epoch, who in offer.views}
        epochs: dict[int, set[int]] = {}
        for offer in offers.values():
            for round_, epoch in offer.rounds:
                epochs.setdefault(round_, set()).update([epoch] if epoch >= 0 else [])
        kept = {slot: {round_ for round_, _ in offer.rounds} for slot, offer in offers.items()}
        first, who = cut, dict[int, tuple[tuple[int, int], ...]]()
        while True:
            round_, found = first - 1, epochs.get(first - 1, set())
            if len(found) != 1 or not (pushed := views.get(next(iter(found)), ())):
                return _Reach(first, who, f"nobody has kept round {round_}")
            lacking = [slot for slot, inc in pushed if members.get(slot) != inc or round_ not in kept[slot]]
            if lacking:
                return _Reach(first, who, f"what worker {lacking[0]} pushed in round {round_} is not kept any more")
            first, who[round_] = round_, pushed

    def _candidates(self, layout: int, key: Key, cut: int, reach: _Reach) -> Iterator[Base]:
        """Yield what a replay may start from, the newest first."""
        where = (layout, key.number)
        if where not in self._bases:
            copies = self._copies.get(where)
            self._bases[where] = ([] if copies is None else _bases(copies)) or [self._begins(layout, key)]
        for base in self._bases[where]:
            if reach.first <= base.round and (base.round < cut or (base.round == cut and base.anew)):
                yield base

    def _missing(self, where: tuple[int, int], base: Base, cut: int, reach: _Reach) -> list[tuple[int, int]]:
        """Return (round, slot) of the pushes that are still to come."""
        pushes = self._pushes.get(where, {})
        rounds = range(base.round, cut)
        return [(round_, slot) for round_ in rounds for slot, inc in reach.members[round_] if (round_, slot, inc) not in pushes]

    def _replayed(self, layout: int, key: Key, base: Base, cut: int, reach: _Reach) -> KeyRecord | None:
        """Return a record, in memory of its own, after round cut - 1; None where a result is not what workers decided by."""
        record = KeyRecord(key, round=base.round - 1, bound=base.bound, bound_before=base.bound)
        record.halves[0] = None if base.residual is None else base.residual.copy()
        record.tally = record.tally_before = base.tally
        pushes = self._pushes.get((layout, key.number), {})
        for round_ in range(base.round, cut):
            mine = [pushes[round_, *who] for who in reach.members[round_]]
            skipped = mine[0].held.message.previous_skipped
            try:
                outcome = self._folding(layout, record, [each.held for each in mine], skipped)
            except CodecError:
                return None
            said = {(each.kind, each.digest) for each in mine if each.kind}
            if said != {(outcome.kind, _digest_of(outcome.frames))}:
                self._notes.append(_note("replay differs", layout, key, round=round_, since=base.round))
                return None
            result = m.Result(layout, key.number, round_, 0, outcome.kind, outcome.used)
            record.finish(Finished(result, ()), outcome, frozenset(), skipped=skipped)
        return record


def _note(event: str, layout: int, key: Key, **fields: Any) -> Note:
    return Note(event, {"layout": layout, "key": key.number} | fields)


def _digest_of(frames: Iterable[memoryview]) -> int:
    """Return the xxh3-64 of a result's payload; 0 where it has none."""
    digest, length = xxhash.xxh3_64(), 0
    for frame in frames:
        digest.update(frame)
        length += frame.nbytes
    return digest.intdigest() if length else 0


def _bases(copies: Copies) -> list[Base]:
    """Return what a key's copies are of, the newest first, without what has been taken back."""
    bases: list[Base] = []
    for header, vector in copies.found():
        round_, bound, tally, anew = msgspec.msgpack.decode(header, type=tuple[int, int, Tally, bool])
        if not bases or round_ <= bases[0].round:
            bases.append(Base(round_, bound, tally, anew, np.frombuffer(vector, np.float32) if vector else None))
    return bases
