"""How a worker comes into rounds that others make: it fetches the state of one of them, and goes on where they stand.

    behind ──asks for a place──> a view has it in ──fetches the state of a layout──> goes on where that view begins

A worker that is taken out again meanwhile begins anew.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from ps_accordion.errors import RunOver

from .client import Client
from .handover import unpacked
from .rounds import Standing
from .tracked import Tracked
from .transfer import START, Blob, Donor, Joiner, StateBytes

__all__ = ["Entry", "over_is_fine"]


@contextlib.contextmanager
def over_is_fine(restarted: bool) -> Iterator[None]:
    """End the process with 0 where the run has ended well, if this one was started again after a death: nothing is left to do."""
    try:
        yield
    except RunOver as over:
        if not restarted:
            raise
        print(f"ps-accordion: started again too late: {over}", file=sys.stderr, flush=True)
        raise SystemExit(0) from None


class Entry:
    """Brings one worker to where the others are, and the others to where it is.

    Args:
        client: Of the worker; it has joined.
        restarted: Whether this process was started again after a death.
    """

    def __init__(self, client: Client, *, restarted: bool) -> None:
        self._client = client
        self.restarted = restarted

    def offer(self, donor: Donor, number: int) -> None:
        """Have a state of layout `number` ready for those who ask for it."""
        self._client.call(lambda: self._client.donors.__setitem__(number, donor))

    def fetch(self, number: int, round_: int, state: StateBytes | Blob, donor: int, *, anybody: bool = False) -> bool:
        """Fetch a state; return whether all of it has come, before this worker was taken out of the run.

        Args:
            number: Of the layout.
            round_: After which round.
            state: Where it goes.
            donor: Slot to ask.
            anybody: Whether other members may have it, too.
        """
        client = self._client
        membership = client.membership
        # Where training starts, and after a JOIN, one worker alone has it.
        view = membership.view
        others = [slot for slot, _ in view.members] if anybody and view is not None else []
        asker = (membership.slot, membership.incarnation)
        joiner = Joiner(number, round_, state, client.settings, asker, donor, others)
        client.call(lambda: client.joiners.__setitem__(number, joiner))

        def stands() -> bool:
            # A view that restores a shard may begin a round earlier, and then nobody has this state.
            return membership.member and (not anybody or membership.cut_of(number) > round_)

        while (progress := joiner.progress) and stands():
            # Every part that comes is a sign of life: a large model over a slow link may take longer in all.
            moved = functools.partial(_has_moved, joiner, progress, stands)
            client.wait(moved, f"the next part of worker {donor}'s parameters", client.settings.timeouts.join)
        client.call(lambda: client.joiners.__delitem__(number))
        return not joiner.progress

    def take_part(self, layouts: Sequence[Tracked]) -> int | None:
        """Come into the rounds of all layouts where they stand.

        Returns:
            The round of the first layout with which this worker goes on; None where it was in all the time.

        Raises:
            SystemExit: The run has ended well, and this process was started again too late for it.
            PsAccordionError: The run has failed.
        """
        if not self._client.behind:
            return None
        with over_is_fine(self.restarted):
            return self._come_in(layouts)

    def _come_in(self, layouts: Sequence[Tracked]) -> int:
        client = self._client
        began = time.monotonic()
        while client.behind:
            if not client.membership.member:
                client.ask_in()
                client.run(lambda: None)  # now it is asked for
            client.wait(self._has_place, "a place in the run")
            if client.membership.out:
                continue
            for tracked in layouts:
                if tracked.exchange.behind:
                    self._catch_up(tracked)
        rounds = [tracked.exchange.rounds.round for tracked in layouts]
        waited = round(time.monotonic() - began, 3)
        where = f"at round {rounds[0]} " if rounds else ""
        print(f"ps-accordion: this worker came into the run {where}with the state of the others", file=sys.stderr, flush=True)
        client.events.write(event="took part", incarnation=client.membership.incarnation, rounds=rounds, waited_s=waited)
        return rounds[0] if rounds else 0

    def _has_place(self) -> bool:
        """Whether this worker is in, or has been taken out again before all servers knew it, and has to ask anew."""
        membership = self._client.membership
        return membership.out or (membership.member and membership.inside)

    def _catch_up(self, tracked: Tracked) -> None:
        """Take over the state of one layout, and go on in the round with which this worker's view begins.

        Nothing has happened where this worker was taken out of the run again meanwhile.
        """
        client, exchange = self._client, tracked.exchange
        membership = client.membership
        incarnation, view = membership.incarnation, membership.view
        assert view is not None
        if exchange.rounds.held:
            client.wait(lambda: not exchange.rounds.held or not membership.member, "a view that restores a shard")
            return
        cut, _ = view.cut_of(exchange.number)
        standing = Standing()
        if cut > 0:
            blob = Blob()
            if not self.fetch(exchange.number, cut - 1, blob, view.donor, anybody=True):
                return
            standing, model = unpacked(blob.bytes())
            tracked.apply(model)
        elif tracked.start is not None:
            if not self.fetch(exchange.number, START, tracked.start, view.donor):
                return
            tracked.start.write_back()
        tracked.start = None

        def admit() -> None:
            # The view may have changed while the state came, but who is still in it has missed no round.
            same = membership.member and membership.incarnation == incarnation
            if same and not exchange.rounds.held and membership.cut_of(exchange.number) >= cut:
                exchange.admit(standing, incarnation)

        client.run(admit)


def _has_moved(joiner: Joiner, progress: tuple[int, ...], stands: Callable[[], bool]) -> bool:
    return joiner.progress != progress or not stands()
