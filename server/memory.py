"""What a shard writes down so that it outlives its process: the bytes that a `ShardStore` keeps, and what they say.

    of a key     the header below; payload and plan of the last result     when a round is finished, or a view has changed it
    of a shard   epoch, promise, the last view's members and cuts          when it promises, and when it obeys a view

The shard's record and those of its keys are not written as one. So a view is written with its cuts first, and whoever finds it
applies it once more to every key: one that was finished under it is left alone, and for the others twice is the same as once.
Pushes of the open round, and a plan that waits for a result, are not kept: workers push again, and the coordinator repeats.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ps_accordion.codecs import registry
from ps_accordion.codecs.registry import Codecs
from ps_accordion.config import Settings
from ps_accordion.layout import Key, Layout, read_table
from ps_accordion.ledger import NO_TALLY, Tally
from ps_accordion.regimes.plan import plan_bound
from ps_accordion.selection import EXACT, Selection, codecs_of, lay_out
from ps_accordion.wire import messages as m

from .durable import KeySize, KeyStore, ShardStore
from .record import Finished, KeyRecord

__all__ = ["ShardMemory", "ShardState"]


class ShardState(msgspec.Struct, frozen=True, array_like=True):
    """What a shard knows of the run.

    Attributes:
        epoch: Number of the last view that it obeyed; -1 before the first.
        promise: Number of the last view that it promised.
        members: (slot, incarnation) of that view.
        cuts: (layout, cut, previous epoch) of that view.
        new: Slots that the view before did not have, or had with another incarnation.
        donor: Slot of that view from which they take over the state.
        anew: Whether some key has lost what a former self of the shard had of it.
    """

    epoch: int = -1
    promise: int = -1
    members: list[tuple[int, int]] = []
    cuts: list[tuple[int, int, int]] = []
    new: list[int] = []
    donor: int = 0
    anew: bool = False

    def is_blank(self, layout: int, record: KeyRecord) -> bool:
        """Whether a key lacks the round with which this view's rounds go on: it was finished by a former self of the shard."""
        return record.round < self.cut_of(layout)[0] - 1

    def cut_of(self, layout: int) -> tuple[int, int]:
        """Return (cut, previous epoch) of a layout."""
        return next(((cut, epoch) for of, cut, epoch in self.cuts if of == layout), (0, -1))

    def apply(self, layout: int, record: KeyRecord) -> None:
        """Have a key obey the view, unless it has finished a round under it."""
        if record.epoch >= self.epoch:
            return
        record.undo(*self.cut_of(layout))
        record.admit(dict(self.members).keys(), set(self.new), donor=self.donor)


class _Header(msgspec.Struct, frozen=True, array_like=True):
    round: int
    epoch: int
    before: int
    after: int
    written: tuple[bool, bool]
    plan: int
    plan_before: int
    bound: int
    bound_before: int
    current: list[int] | None
    current_before: list[int] | None
    result: m.Result | None
    tally: Tally = NO_TALLY
    tally_before: Tally = NO_TALLY


class ShardMemory:
    """The records of one shard in its store.

    Args:
        store: The store; it stays the caller's.
        settings: The settings of the job: they say how large a result can be.
    """

    def __init__(self, store: ShardStore, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._codecs = codecs_of(settings.codec)
        self._keys: dict[tuple[int, int], KeyStore] = {}
        self.most: dict[tuple[int, int], int] = {}
        """Bytes of the largest payload that there is room for, by layout and key."""

    def state(self) -> ShardState:
        """Return what was last written of the shard; where nothing was, what a new one knows."""
        record = self._store.record
        return msgspec.msgpack.decode(record, type=ShardState) if record else ShardState()

    def write(self, state: ShardState) -> None:
        """Write down what the shard knows. When this returns, a process that starts later knows it too."""
        self._store.write_record(msgspec.msgpack.encode(state))

    @property
    def layouts(self) -> dict[int, Layout]:
        """The layouts that are kept."""
        tables = sorted(self._store.layouts.items())
        return {number: lay_out(read_table(table), self._settings) for number, table in tables}

    def hold(self, number: int, layout: Layout, keys: Sequence[Key]) -> list[KeyRecord]:
        """Return the record of each of a layout's keys that are the shard's, as last written; make room for a new layout.

        Raises:
            ConfigError: The layout is kept with another table, or under other settings.
            StorageError: There is no room.
        """
        plan = plan_bound(len(layout.tensors))
        selection = Selection(self._settings.codec, layout)
        most = {key.number: _payload_most(key, selection, self._codecs) for key in keys}
        sizes = [KeySize(key.elements, most[key.number], 0 if key.number else plan) for key in keys]
        stores = self._store.add_layout(number, layout.table, sizes)
        self._keys.update({(number, key.number): store for key, store in zip(keys, stores, strict=True)})
        self.most.update({(number, key): nbytes for key, nbytes in most.items()})
        return [_loaded(key, store) for key, store in zip(keys, stores, strict=True)]

    def save(self, layout: int, record: KeyRecord) -> None:
        """Write down a key's record: only then may its result leave."""
        result = record.result
        message = None if result is None else result.message
        frames = () if result is None else result.frames
        count = len(frames) if message is None else len(message.frames)
        self._keys[layout, record.key.number].store(_header(record), frames[:count], b"".join(frames[count:]))

    def close(self) -> None:
        """Let go of the keys. The store stays open."""
        self._keys.clear()


def _payload_most(key: Key, selection: Selection, codecs: Codecs) -> int:
    """Return the bytes of the largest payload that a member of this job may push for a key, and so of the largest result."""
    # A client of another make may send plain float32, whatever the plan says.
    codecs = registry.fitted(codecs, key.rows)
    choices = (EXACT, selection.light[key.tensor], selection.heavy[key.tensor])
    return max(codecs[codec].payload_bound(key.elements, level) for codec, level in choices)


def _header(record: KeyRecord) -> bytes:
    current, current_before = (
        None if slots is None else sorted(slots) for slots in (record.current, record.current_before)
    )  # fmt: skip
    first, second = record.halves
    header = _Header(
        record.round, record.epoch, record.before, record.after, (first is not None, second is not None), record.plan,
        record.plan_before, record.bound, record.bound_before, current, current_before,
        None if record.result is None else record.result.message, record.tally, record.tally_before,
    )  # fmt: skip
    return msgspec.msgpack.encode(header)


def _loaded(key: Key, store: KeyStore) -> KeyRecord:
    record = KeyRecord(key, memory=store.halves)
    stored = store.load()
    if stored is None:
        return record
    header = msgspec.msgpack.decode(stored.header, type=_Header)
    record.round, record.epoch = header.round, header.epoch
    record.before, record.after = header.before, header.after
    record.halves = [half if written else None for half, written in zip(store.halves, header.written, strict=True)]
    record.plan, record.plan_before = header.plan, header.plan_before
    record.bound, record.bound_before = header.bound, header.bound_before
    record.tally, record.tally_before = header.tally, header.tally_before
    record.current = None if header.current is None else frozenset(header.current)
    record.current_before = None if header.current_before is None else frozenset(header.current_before)
    if header.result is not None:
        frames = [*stored.frames, stored.plan] if stored.plan else stored.frames
        record.result = Finished(header.result, tuple(memoryview(frame) for frame in frames))
    return record
