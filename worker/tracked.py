"""An exchange with what is measured around it: statistics for the policy, counters and metrics."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ps_accordion.codecs.base import FloatVector
from ps_accordion.layout import Layout
from ps_accordion.regimes import parse_span
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Send

from .exchange import Exchange, Timing
from .member import COORDINATOR
from .rounds import Decide
from .window import Report, WindowStatistics

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Tracked"]

RATE_COPIES = 3
"""How often a learning rate is sent: nobody answers, and the next window's report has it again."""
UNMARKED_ROUNDS = 200
"""Rounds without any mark of an epoch after which a run whose windows are epochs says so: all steps are light until then."""
REPEAT_S = 0.5
"""How often a report is sent again until the coordinator has heard it."""


class Tracked:
    """One layout of a session.

    Args:
        session: The session.
        number: Number of the layout.
        layout: The layout.
        decided: Called, on the socket's thread, when a round is decided.
    """

    def __init__(self, session: Session, number: int, layout: Layout, decided: Callable[[Decide], None] | None) -> None:
        self.exchange = Exchange(session.client, number, layout, self._on_decided)
        self.done = threading.Event()
        self.settled: Callable[[], bool] = lambda: True
        """Whether what was decided has reached its place; a wrapper knows."""
        self._session = session
        self._decided = decided
        self._statistics = WindowStatistics(layout, parse_span(session.settings.regime.window))
        self._rate = math.nan
        self._loss = math.nan
        self._begun = False
        session.client.on_failure(lambda _: self.done.set())
        self._rates: list[Send] = []
        self._rate_due = 0.0
        self._reports: dict[int, tuple[Send, float]] = {}

    # ------------------------------------------------------------ the thread that computes gradients

    def add(self, tensor: int, gradient: FloatVector, *, used: bool = True) -> None:
        """Hand over a gradient; see `Exchange.add`."""
        if not self._begun:
            self._begin_round()
        if used:
            self._statistics.add(tensor, gradient)
        self.exchange.add(tensor, gradient, used=used)

    def _begin_round(self) -> None:
        self._begun = True
        self.done.clear()
        self._session.meter.start()
        rate = self._session.rate()
        if rate != self._rate and not math.isnan(rate):
            # The scheduler has stepped by now, so the policy hears of a drop before the first push that uses it.
            self._rate = rate
            membership = self._session.client.membership
            message = m.Rate(membership.slot, membership.incarnation, self.exchange.number, self.exchange.rounds.round, rate)
            self._rates = [Send((COORDINATOR,), message)] * RATE_COPIES
            self._rate_due = 0.0
            self._session.client.call(self.tick)

    def wait(self) -> str:
        """Wait until the round is decided; Ctrl-C gets through.

        Returns:
            What was decided: DATA or SKIP.

        Raises:
            PsAccordionError: The run has failed.
        """
        client = self._session.client
        # An event of its own: who waits for a condition of the client wakes with every message.
        while not self.done.wait(1.0) and client.error is None:
            pass
        if client.error is not None:
            raise client.error
        return self._kind

    def begin_epoch(self, epoch: int) -> None:
        """Mark the beginning of an epoch, between two rounds."""
        self._report(self._statistics.begin_epoch(epoch))

    def loss(self, loss: float) -> None:
        """Note the loss of the step that was just made: it counts for the next round's statistics."""
        self._loss = loss

    # ------------------------------------------------------------ the thread that owns the sockets

    def _on_decided(self, decision: Decide, timing: Timing) -> None:
        self._session.meter.decided(self.exchange, decision, timing)
        if self._begun:
            self._begun = False
            skipped = decision.kind == "SKIP"
            report = self._statistics.finish_round(decision.round, rate=self._rate, loss=self._loss, skipped=skipped)
            self._report(report)
            if decision.round == UNMARKED_ROUNDS and self._statistics.waits_for_epoch:
                self._warn_of_epochs()
        self._kind = decision.kind
        if self._decided is not None:
            self._decided(decision)
        self.done.set()

    def _report(self, report: Report | None) -> None:
        if report is None:
            return
        membership = self._session.client.membership
        message = m.Report(
            membership.slot, membership.incarnation, self.exchange.number, report.window, report.round, report.rate, report.loss
        )
        send = Send((COORDINATOR,), message, (report.norms.tobytes(),))
        self._session.client.call(lambda: self._reports.__setitem__(report.window, (send, 0.0)))

    def _warn_of_epochs(self) -> None:
        settings = self._session.settings.regime
        if settings.policy == "static":
            return
        text = (
            f"regime.window is {settings.window!r} and no epoch has begun in {UNMARKED_ROUNDS} rounds, so all levels stay light: "
            'call session.begin_epoch(epoch), track a sampler with set_epoch, or set regime.window to "N steps"'
        )
        self._session.client.events.write(event="warning", reason=text)
        print(f"ps-accordion: {text}", file=sys.stderr, flush=True)

    def heard(self, window: int) -> None:
        """Note that the coordinator has a report."""
        self._reports.pop(window, None)

    def tick(self) -> None:
        """Send reports until they are heard."""
        now = time.monotonic()
        if self._rates and now >= self._rate_due:
            self._rate_due = now + REPEAT_S
            self._session.client.carry([self._rates.pop()])
        for window, (send, due) in list(self._reports.items()):
            if now >= due:
                self._reports[window] = (send, now + REPEAT_S)
                self._session.client.carry([send])
