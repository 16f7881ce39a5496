"""What a worker keeps of the last round, so that a shard that has lost its memory can go on after it."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import Buffer

from ps_accordion.layout import Layout
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Send

__all__ = ["Retained"]


class Retained:
    """The results by which a worker decided the last round, as they came, and those of the open one.

    Args:
        number: Number of the layout.
        layout: The layout.
    """

    def __init__(self, number: int, layout: Layout) -> None:
        self._number = number
        self._layout = layout
        self._open: dict[int, tuple[m.Result, tuple[Buffer, ...]]] = {}
        self._last: dict[int, tuple[m.Result, tuple[Buffer, ...]]] = {}

    def note(self, result: m.Result, frames: Sequence[Buffer]) -> None:
        """Keep a result of the open round, in the place of one that a view has taken back."""
        self._open[result.key] = (result, tuple(frames))

    def decided(self) -> None:
        """Note that the open round is the last one now."""
        self._last, self._open = self._open, {}

    def forget(self) -> None:
        """Note that the last round was decided by others: this worker has taken over their state."""
        self._last, self._open = {}, {}

    def standing(self, round_: int) -> tuple[int, int, int, bool]:
        """Return what a promise says of this layout, whose open round is `round_`."""
        whole = len(self._last) == len(self._layout.keys)
        epoch = self._last[0][0].epoch if whole else -1
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
            Send((server_of[shard],), m.Restore(view.p, boots[shard], *who, version, result), frames)
            for key, (result, frames) in self._last.items()
            if (shard := self._layout.keys[key].shard) in boots
        ]
