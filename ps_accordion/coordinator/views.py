"""Who is in, from which round on: proposals, promises and views.

    view p ──propose──> FREEZE q ──every shard has promised──> cut = lowest finished round + 1 ──> VIEW q, q > p

A number is never used twice. Where somebody else comes or goes before all have promised, a proposal of a higher number takes the
place of the first. Shards that have promised wait for a view that is no older than their promise, so one must always follow:
also where a coordinator finds in its log that the one before it proposed, and no view.

The rules are those that a simulation took through thousands of kills; `docs/wire.md` has them for other languages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..wire import messages as m
from .history import History

__all__ = ["Proposal", "Views"]

MAX_REMOVED = 256
"""Removed incarnations that a view names. Only one that lives on and comes back needs to know, with the next view or two."""

ShardPlace = tuple[int, int, str]
"""(number, boot, address) of a shard."""


@dataclass
class Proposal:
    """A view that is being made.

    Attributes:
        p: Its number.
        members: Incarnation of each slot that is to be in it.
        reports: What each shard that has promised said.
        promises: What each worker that has promised said, by slot; asked for only where a shard is blank.
    """

    p: int
    members: dict[int, int]
    reports: dict[int, m.Frozen] = field(default_factory=dict)
    promises: dict[int, m.Promise] = field(default_factory=dict)


class Views:
    """The views of one run. No clock: somebody else decides when who is missed for too long.

    Args:
        history: What earlier coordinators of the run have logged.

    Attributes:
        view: The last view; None before the first.
        proposal: The view that is being made, if one is.
    """

    def __init__(self, history: History | None = None) -> None:
        history = history or History()
        self.view = history.view
        self.proposal: Proposal | None = None
        self._last = history.proposed
        self._removed = {pair: dict(cuts) for pair, cuts in history.removed.items()}

    @property
    def members(self) -> dict[int, int]:
        """Incarnation of each slot in the last view."""
        return dict(self.view.members) if self.view is not None else {}

    @property
    def aim(self) -> dict[int, int] | None:
        """Who is to be in: in the proposal, else in the last view; None where shards may wait for a view that nobody makes."""
        if self.proposal is not None:
            return self.proposal.members
        owed = self.view is not None and self._last > self.view.p
        return None if owed else self.members

    @property
    def removed(self) -> list[tuple[int, int]]:
        """(slot, incarnation) of who was in a view and is not in the last one, oldest first."""
        return list(self._removed)

    def was_removed(self, slot: int, incarnation: int) -> bool:
        """Whether this incarnation was in a view and is not in the last one: it is never let in again."""
        return (slot, incarnation) in self._removed

    def took_back(self, slot: int, incarnation: int, rounds: Mapping[int, int]) -> bool:
        """Whether one of these rounds, by layout, does not count under the view that removed this incarnation, or a later one."""
        cuts = self._removed.get((slot, incarnation), {})
        return any(cuts.get(layout, round_ + 1) <= round_ for layout, round_ in rounds.items())

    def first(self, members: Mapping[int, int], shards: Sequence[ShardPlace], rounds: Mapping[int, int] | None = None) -> m.View:
        """Make the view that a run begins with. Nothing has been finished in it, so nobody has to promise anything.

        Args:
            members: Incarnation of each slot.
            shards: All shards.
            rounds: The round with which a layout begins, where that is not 0: the run goes on from a checkpoint.
        """
        self._last = 1
        cuts = [(layout, round_, -1) for layout, round_ in sorted((rounds or {}).items())]
        self.view = m.View(1, sorted(members.items()), cuts, list(shards), [], min(members), [])
        return self.view

    def propose(self, members: Mapping[int, int]) -> Proposal:
        """Begin a view with these members, in place of a proposal that may be under way."""
        self._last += 1
        self.proposal = Proposal(self._last, dict(members))
        return self.proposal

    def promised(self, report: m.Frozen) -> None:
        """Take in a shard's promise. One for another number is late."""
        if self.proposal is not None and report.p == self.proposal.p:
            self.proposal.reports[report.shard] = report

    def worker_promised(self, promise: m.Promise) -> None:
        """Take in a worker's promise. One for another number is late."""
        proposal = self.proposal
        if proposal is not None and promise.p == proposal.p and proposal.members.get(promise.slot) == promise.incarnation:
            proposal.promises[promise.slot] = promise

    def blank(self, shards: Sequence[ShardPlace]) -> list[tuple[int, int]]:
        """Return (number, boot) of the shards that have lost what they knew: their boots are new, or they say so.

        One that has not obeyed the last view does not know that it is blank, if that view was the first to name its boot.
        """
        known = {number: boot for number, boot, _ in self.view.shards} if self.view is not None else {}
        restored = self.view.restore if self.view is not None else []
        reports = self.proposal.reports if self.proposal is not None else {}

        def says_so(number: int, boot: int) -> bool:
            report = reports.get(number)
            if report is None or self.view is None:
                return False
            return report.blank or ((number, boot) in restored and report.epoch < self.view.p)

        return [(number, boot) for number, boot, _ in shards if known.get(number) != boot or says_so(number, boot)]

    def missing_workers(self, shards: Sequence[ShardPlace]) -> list[int]:
        """Return the slots of workers that stay, and have to promise and have not yet: where a shard is blank, all of them."""
        proposal = self.proposal
        if proposal is None or not self.blank(shards):
            return []
        return [slot for slot in self._staying(proposal) if slot not in proposal.promises]

    def unrestorable(self, shards: Sequence[ShardPlace], layouts: Iterable[int], begun: Mapping[int, int]) -> list[int]:
        """Return the layouts whose last results no worker has that stays, though a shard is blank.

        Args:
            shards: All shards.
            layouts: Numbers of the layouts whose rounds have begun.
            begun: The round with which a layout began, where that is not 0: a checkpoint has what is needed for that one.
        """
        proposal = self.proposal
        if proposal is None or not self.blank(shards):
            return []
        lost = []
        for layout in layouts:
            cut, _ = self._cut_of_workers(layout, proposal)
            said = [each for promise in proposal.promises.values() for each in promise.layouts if each[0] == layout]
            if cut > begun.get(layout, 0) and not any(whole for _, round_, _, whole in said if round_ == cut):
                lost.append(layout)
        return lost

    def _staying(self, proposal: Proposal) -> list[int]:
        return [slot for slot, incarnation in self.members.items() if proposal.members.get(slot) == incarnation]

    def missing(self, shards: Sequence[ShardPlace]) -> list[int]:
        """Return the shards that have not promised yet."""
        reports = self.proposal.reports if self.proposal is not None else {}
        return [number for number, boot, _ in shards if number not in reports or reports[number].boot != boot]

    def commit(self, shards: Sequence[ShardPlace], *, donor: int, layouts: Iterable[int]) -> m.View:
        """Make the proposed view, once no promise is missing.

        Args:
            shards: All shards.
            donor: Slot of a member that has the state after the last round.
            layouts: Numbers of the layouts whose rounds have begun.
        """
        old, proposal = self.view, self.proposal
        assert old is not None
        assert proposal is not None
        restore = self.blank(shards)
        cuts = [
            (layout, *(self._cut_of_workers(layout, proposal) if restore else self._cut(layout, proposal.reports.values())))
            for layout in layouts
        ]
        now = {(slot, incarnation) for slot, incarnation in old.members if proposal.members.get(slot) != incarnation}
        self._removed |= {pair: {} for pair in sorted(now)}
        for pair, removed in self._removed.items():
            for layout, cut, _ in cuts:
                # Of a layout that began after it was removed, nothing that it pushed counts.
                removed[layout] = min(removed.get(layout, cut if pair in now else 0), cut)
        while len(self._removed) > MAX_REMOVED:
            del self._removed[next(iter(self._removed))]
        self.view = m.View(
            proposal.p,
            sorted(proposal.members.items()),
            cuts,
            list(shards),
            restore,
            donor,
            # Where no layout had begun there is no cut, but who was taken out has to know that it was.
            [(*pair, layout, cut) for pair, at in self._removed.items() for layout, cut in (at or {0: 0}).items()],
        )
        self.proposal = None
        return self.view

    def _cut_of_workers(self, layout: int, proposal: Proposal) -> tuple[int, int]:
        """Return the same where a shard is blank: the highest round that a worker has open, and the epoch of the one before."""
        said = [
            (round_, whole, epoch)
            for promise in proposal.promises.values()
            for of, round_, epoch, whole in promise.layouts
            if of == layout
        ]
        if not said:
            return 0, -1
        cut, _, epoch = max(said)
        return cut, epoch

    def _cut(self, layout: int, reports: Iterable[m.Frozen]) -> tuple[int, int]:
        """Return the first round that counts under the new view, and the epoch of the round before it."""
        done = [
            self._capped(layout, report.epoch, round_, epoch)
            for report in reports
            for of, round_, epoch in report.done
            if of == layout
        ]
        if not done:
            return 0, -1
        last = min(round_ for round_, _ in done)
        epochs = {epoch for round_, epoch in done if round_ == last}
        assert len(epochs) == 1, f"round {last} of layout {layout} was finished under views {sorted(epochs)}"
        return last + 1, epochs.pop()

    def _capped(self, layout: int, seen: int, round_: int, epoch: int) -> tuple[int, int]:
        """Return what a report is worth: a shard that has not seen the last view may report rounds which that view undoes."""
        assert self.view is not None
        cut, previous_epoch = self.view.cut_of(layout)
        if seen < self.view.p and round_ >= cut - 1:
            return cut - 1, previous_epoch
        return round_, epoch
