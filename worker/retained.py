"""What a worker keeps of past rounds, so that a shard that has lost its memory can go on after them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import xxhash
from typing_extensions import Buffer

from ps_accordion.codecs.base import Payload
from ps_accordion.layout import Layout
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Send
from ps_accordion.wire.framing import split_frames
from ps_accordion.wire.lane import Loan

__all__ = ["Retained"]

Pushes = Mapping[int, tuple[m.Push, Payload | None]]
"""Pushes of one round with their payloads, by key."""


class _Past(NamedTuple):
    """A round that is over: what was pushed, and kind and digest of each key's result."""

    round: int
    epoch: int
    pushes: Pushes
    results: dict[int, tuple[m.ResultKind, int]]


class _Kept(NamedTuple):
    """A result as it came."""

    result: m.Result
    frames: tuple[Buffer, ...]
    loan: Loan | None


class Retained:
    """The results by which a worker decided the last round, as they came, those of the open one, and pushes of some rounds.

    Args:
        number: Number of the layout.
        layout: The layout.
        rounds: Whose pushes are kept, at the cost of so many payloads a key.
    """

    def __init__(self, number: int, layout: Layout, *, rounds: int = 0) -> None:
        self._number = number
        self._layout = layout
        self._open: dict[int, _Kept] = {}
        self._last: dict[int, _Kept] = {}
        self._past: deque[_Past] = deque(maxlen=rounds)
        self._views: dict[int, list[tuple[int, int]]] = {}

    def note(self, result: m.Result, frames: Sequence[Buffer], loan: Loan | None = None) -> None:
        """Keep a result of the open round, in the place of one that a view has taken back.

        Frames that are lent are not copied: a server writes over those of a round only when all have decided the next one.
        """
        self._open[result.key] = _Kept(result, tuple(frames), loan)

    def seen(self, view: m.View | None) -> None:
        """Note who is in a view."""
        if view is not None and self._past.maxlen:
            self._views[view.p] = view.members

    def decided(self, round_: int, pushes: Pushes) -> None:
        """Note that the open round, in which this worker has pushed this, is the last one now."""
        if self._past.maxlen:
            results = {key: (kept.result.kind, _digest(kept.result, kept.frames)) for key, kept in self._open.items()}
            epoch = self._open[0].result.epoch
            self._past.append(_Past(round_, epoch, dict(pushes), results))
            needed = {past.epoch for past in self._past}
            self._views = {p: members for p, members in self._views.items() if p in needed or p > epoch}
        self._last, self._open = self._open, {}

    def forget(self) -> None:
        """Note that the last round was decided by others: this worker has taken over their state."""
        self._last, self._open = {}, {}
        self._past.clear()

    def standing(self, round_: int) -> tuple[int, int, int, bool]:
        """Return what a promise says of this layout, whose open round is `round_`."""
        whole = len(self._last) == len(self._layout.keys)
        epoch = self._last[0].result.epoch if whole else -1
        return self._number, round_, epoch, whole or round_ == 0

    def restores(self, view: m.View, round_: int, version: int, *, who: tuple[int, int], server_of: dict[int, str]) -> list[Send]:
        """Return what the blank shards of a view lack, if this worker has it: the last results of their keys.

        Args:
            view: The view.
            round_: The open round.
            version: Of the plan in force.
            who: Slot and incarnation of this worker.
            server_of: Link to each blank shard.
        """
        if round_ != view.cut_of(self._number)[0]:
            return []
        boots = dict(view.restore)
        return [
            Send((server_of[shard],), m.Restore(view.p, boots[shard], *who, version, kept.result), kept.frames)
            for key, kept in self._last.items()
            if (shard := self._layout.keys[key].shard) in boots and (kept.loan is None or kept.loan.stands)
        ]

    def offers(self, view: m.View, open_: Pushes, *, who: tuple[int, int], server_of: dict[int, str]) -> list[Send]:
        """Return what tells the blank shards of a view of which rounds there are pushes.

        Args:
            view: The view.
            open_: What has been pushed of the open round, if that is all of it.
            who: Slot and incarnation of this worker; what it pushed as another does not count.
            server_of: Link to each blank shard.
        """
        if not self._past.maxlen:
            return []
        past = [each for each in self._past if _sender(each.pushes) == who]
        rounds = [(each.round, each.epoch) for each in past]
        if open_ and _sender(open_) == who:
            rounds.append((open_[0][0].round, -1))
        views = [(epoch, self._views[epoch]) for epoch in sorted({each.epoch for each in past}) if epoch in self._views]
        return [
            Send((server_of[shard],), m.Offer(view.p, boot, *who, self._number, rounds, views)) for shard, boot in view.restore
        ]

    def since(self, round_: int, who: tuple[int, int]) -> list[tuple[m.Push, Payload | None]]:
        """Return what this worker pushed as `who` in rounds from `round_` on that it has decided, as far as it is kept."""
        return [
            pair for past in self._past if past.round >= round_ and _sender(past.pushes) == who for pair in past.pushes.values()
        ]

    def replays(self, wanted: Iterable[tuple[int, int]], open_: Pushes, *, boot: int, link: str) -> list[Send]:
        """Return pushes again.

        Args:
            wanted: (key, round) of each.
            open_: What has been pushed of the open round.
            boot: Of the shard that wants them.
            link: To it.
        """
        sends = []
        for key, round_ in wanted:
            past = next((past for past in self._past if past.round == round_), None)
            push, payload = (open_ if past is None else past.pushes).get(key, (None, None))
            if push is not None and push.round == round_:
                said = () if past is None else past.results[key]
                sends.append(Send((link,), m.Replay(boot, push, *said), () if payload is None else split_frames(payload.data)))
        return sends


def _sender(pushes: Pushes) -> tuple[int, int]:
    push, _ = pushes[0]
    return push.slot, push.incarnation


def _digest(result: m.Result, frames: Sequence[Buffer]) -> int:
    digest = xxhash.xxh3_64()
    for frame in frames[: len(result.frames)]:
        digest.update(frame)
    return digest.intdigest() if result.frames else 0
