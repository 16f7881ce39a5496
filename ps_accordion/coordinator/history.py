"""What the coordinator of a job must know when it is started again: records that go to the disk before anybody is told.

Each record is plain JSON with a `what`; `History` is what a sequence of them means. In the order of a run:

    joined   {slot, incarnation, token, restart}   before the welcome: a token keeps its incarnation, and none is given out twice
    layout   {layout, table}                       before any server hears of it; the table in base64
    opened   {layout, declared}                    before anybody begins its rounds; the slots that had declared it
    late     {layout, slot}                        before a worker hears that the rounds had begun without it
    proposed {p, members}                          before any shard is asked to promise
    view     {view, out}                           before anybody obeys it; `out` lists all (slot, incarnation) that were removed
    planned  {layout, version, rate}               before a plan of that version leaves: no version stands for two plans
    left     {slot, incarnation, flushed}          before a worker hears that it may go: where its residuals were handed over
    lost     {item}                                a worker taken out by a view, or a shard's memory: its residual may be lost
    found    {who, incarnation}                    what was lost of a shard's memory is all there again
    accounted {account}                            a worker that has finished said what its pushes came to
    kept     {message}                             before a worker hears that a checkpoint is complete, which it is
    ending   {}                                    some worker's rounds have ended: no view follows
    over     {message}                             before anybody is told that the run is over
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..errors import ConfigError
from ..wire import messages as m
from ..wire.actions import Record

__all__ = [
    "History",
    "Joined",
    "Lost",
    "PastLayout",
    "accounted",
    "ending",
    "found",
    "kept",
    "late",
    "layout",
    "left",
    "lost",
    "opened",
    "over",
    "planned",
    "proposed",
    "viewed",
]


@dataclass(frozen=True)
class Joined:
    """Who was let in last under a slot."""

    slot: int
    incarnation: int
    token: str
    restart: int

    def record(self) -> Record:
        """Return what to log before the welcome."""
        fields = {"slot": self.slot, "incarnation": self.incarnation, "token": self.token, "restart": self.restart}
        return Record({"what": "joined", **fields})


class Lost(msgspec.Struct, frozen=True):
    """A residual that is lost.

    Attributes:
        who: Whose, for people: `worker 2`, `shard 1`.
        incarnation: Of the worker, or boot of the shard.
        round: Last round of which something is known.
        norm: About the norm of the residual after that round; None where nobody knows.
        why: What happened.
        successor: Boot of the memory that took its place; 0 for a worker.
    """

    who: str
    incarnation: int
    round: int
    norm: float | None
    why: str
    successor: int = 0

    @property
    def of_shard(self) -> bool:
        """Whether it was a shard's."""
        return self.who.startswith("shard ")

    def __str__(self) -> str:
        norm = "of unknown norm" if self.norm is None else f"norm about {self.norm:.2g}"
        who = self.who if self.of_shard else f"{self.who} (incarnation {self.incarnation})"
        return f"{who}, last heard of after round {self.round}, {norm}: {self.why}"


@dataclass
class PastLayout:
    """A layout that servers have heard of."""

    table: bytes
    opened: bool = False
    declared: set[int] = field(default_factory=set)
    late: set[int] = field(default_factory=set)
    version: int = 0
    """Highest version of a plan that was given out."""
    rate: float | None = None
    """Learning rate when that plan was made."""


@dataclass
class History:
    """What the records of earlier coordinators say.

    Attributes:
        incarnations: The highest that was given out.
        joined: The last one let in, by slot.
        proposed: The highest number that a shard may have promised, or a view has.
        view: The last view.
        removed: Who was in a view and is not in the last one: (slot, incarnation), and the lowest cut since by layout.
        layouts: By number.
        ending: Whether some worker's rounds have ended.
        over: What everybody was told at the end.
        left: (slot, incarnation) of who has left the others, and the round of each layout with its residual.
        lost: Residuals that may be lost.
        found: Whether some shard has lost its memory and got all of it back.
        accounts: Of workers that have finished.
        kept: The last complete checkpoint.
    """

    incarnations: int = 0
    joined: dict[int, Joined] = field(default_factory=dict)
    proposed: int = 0
    view: m.View | None = None
    removed: dict[tuple[int, int], dict[int, int]] = field(default_factory=dict)
    layouts: dict[int, PastLayout] = field(default_factory=dict)
    ending: bool = False
    over: m.Ended | m.Abort | None = None
    left: dict[tuple[int, int], dict[int, int]] = field(default_factory=dict)
    lost: list[Lost] = field(default_factory=list)
    found: bool = False
    accounts: list[m.Account] = field(default_factory=list)
    kept: m.Kept | None = None

    @property
    def settled(self) -> set[int]:
        """Incarnations of those that have left with nothing lost: not of one that had finished when it was taken out."""
        return {pair[1] for pair, flushed in self.left.items() if flushed or pair not in self.removed}

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> History:
        """Replay records, oldest first.

        Raises:
            ConfigError: One is of a kind that this release does not know.
        """
        history = cls()
        for record in records:
            history._take(record)
        return history

    def _take(self, record: Mapping[str, Any]) -> None:
        match record:
            case {"what": "joined", "slot": slot, "incarnation": incarnation, "token": token, "restart": restart}:
                self.incarnations = max(self.incarnations, incarnation)
                self._forget(slot)
                self.joined[slot] = Joined(slot, incarnation, token, restart)
            case {"what": "layout", "layout": number, "table": table}:
                self.layouts[number] = PastLayout(base64.b64decode(table))
            case {"what": "opened", "layout": number, "declared": slots}:
                self.layouts[number].opened = True
                self.layouts[number].declared = set(slots)
            case {"what": "late", "layout": number, "slot": slot}:
                self.layouts[number].declared.add(slot)
                self.layouts[number].late.add(slot)
            case {"what": "proposed", "p": p}:
                self.proposed = p
            case {"what": "view", "view": fields, "out": out}:
                self.view = msgspec.convert(fields, m.View)
                self.proposed = self.view.p
                self.removed = {(slot, incarnation): {} for slot, incarnation in out}
                for slot, incarnation, layout, cut in self.view.removed:
                    self.removed[slot, incarnation][layout] = cut
            case {"what": "planned", "layout": number, "version": version, "rate": rate}:
                self.layouts[number].version = version
                self.layouts[number].rate = rate
            case {"what": "left", "slot": slot, "incarnation": incarnation, "flushed": flushed}:
                self.left[slot, incarnation] = dict(flushed)
                if incarnation in self.settled:
                    self.lost = [item for item in self.lost if item.of_shard or item.incarnation != incarnation]
            case {"what": "lost", "item": item}:
                self.lost.append(msgspec.convert(item, Lost))
                self.left = {
                    pair: at for pair, at in self.left.items() if self.lost[-1].of_shard or pair[1] != self.lost[-1].incarnation
                }
            case {"what": "found", "who": who, "incarnation": incarnation}:
                self.lost = [item for item in self.lost if (item.who, item.incarnation) != (who, incarnation)]
                self.found = True
            case {"what": "accounted", "account": account}:
                self.accounts.append(msgspec.convert(account, m.Account))
            case {"what": "kept", "message": fields}:
                self.kept = msgspec.convert(fields, m.Kept)
            case {"what": "ending"}:
                self.ending = True
            case {"what": "over", "message": fields}:
                self.over = msgspec.convert(fields, m.Ended | m.Abort)
            case _:
                raise ConfigError(
                    f"the coordinator's log holds a record that this release does not know: {record!r:.200}; "
                    "go on with the release that wrote it, or name another run directory"
                )

    def _forget(self, slot: int) -> None:
        """Another process may have this slot: what the one before declared does not hold for it."""
        self.joined.pop(slot, None)
        for layout in self.layouts.values():
            layout.declared.discard(slot)
            layout.late.discard(slot)


# ---------------------------------------------------------------- what to log


def layout(number: int, table: bytes) -> Record:
    """A layout is to be held by the servers."""
    return Record({"what": "layout", "layout": number, "table": base64.b64encode(table).decode()})


def opened(number: int, declared: Iterable[int]) -> Record:
    """The rounds of a layout may begin."""
    return Record({"what": "opened", "layout": number, "declared": sorted(declared)})


def late(number: int, slot: int) -> Record:
    """A worker has declared a layout whose rounds had begun."""
    return Record({"what": "late", "layout": number, "slot": slot})


def proposed(p: int, members: Mapping[int, int]) -> Record:
    """Shards may promise this number."""
    return Record({"what": "proposed", "p": p, "members": [list(member) for member in sorted(members.items())]})


def viewed(view: m.View, out: Sequence[tuple[int, int]]) -> Record:
    """A view is made."""
    fields = msgspec.json.decode(msgspec.json.encode(view))
    return Record({"what": "view", "view": fields, "out": [list(pair) for pair in out]})


def planned(number: int, version: int, rate: float | None) -> Record:
    """A plan of this version is given out."""
    return Record({"what": "planned", "layout": number, "version": version, "rate": rate})


def left(slot: int, incarnation: int, flushed: Mapping[int, int]) -> Record:
    """A worker goes in peace."""
    pairs = [list(pair) for pair in sorted(flushed.items())]
    return Record({"what": "left", "slot": slot, "incarnation": incarnation, "flushed": pairs})


def lost(item: Lost) -> Record:
    """A residual may be lost."""
    return Record({"what": "lost", "item": msgspec.to_builtins(item)})


def found(item: Lost) -> Record:
    """What was lost is there again."""
    return Record({"what": "found", "who": item.who, "incarnation": item.incarnation})


def accounted(account: m.Account) -> Record:
    """A worker has given its whole account."""
    return Record({"what": "accounted", "account": msgspec.json.decode(msgspec.json.encode(account))})


def kept(message: m.Kept) -> Record:
    """A checkpoint is complete."""
    return Record({"what": "kept", "message": msgspec.json.decode(msgspec.json.encode(message))})


def ending() -> Record:
    """Some worker's rounds have ended."""
    return Record({"what": "ending"})


def over(message: m.Ended | m.Abort) -> Record:
    """The run is over."""
    return Record({"what": "over", "message": msgspec.json.decode(msgspec.json.encode(message))})
