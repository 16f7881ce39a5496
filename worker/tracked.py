"""An exchange with what is measured around it: statistics for the policy, counters and metrics."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ps_accordion.layout import Layout
from ps_accordion.regimes import parse_span
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Send

from .device_exchange import DeviceExchange
from .exchange import Exchange, Timing
from .handover import packed
from .host_exchange import HostExchange
from .member import COORDINATOR
from .memory import Gradient
from .rounds import Decide
from .streams import streams_of
from .sums import DeviceSums, HostSums, Sums
from .transfer import START, Blob, Donor, StateBytes
from .window import Report, WindowStatistics

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Tracked", "on_device"]

RATE_COPIES = 3
"""How often a learning rate is sent: nobody answers, and the next window's report has it again."""
UNMARKED_ROUNDS = 200
"""Rounds without any mark of an epoch after which a run whose windows are epochs says so: all steps are light until then."""
REPEAT_S = 0.5
"""How often a report is sent again until the coordinator has heard it."""


def on_device(device: torch.device | None) -> bool:
    """Say whether gradients on `device` are encoded there, rather than on the host; None stands for arrays of the host."""
    return device is not None and device.type != "cpu"


class Tracked:
    """One layout of a session.

    Args:
        session: The session.
        number: Number of the layout.
        layout: The layout.
        decided: Called, on the socket's thread, when a round is decided in which this worker trained. None where it trains
            nothing, but wants the mean of something: that is given no momentum.
        device: Where the gradients lie; None for arrays of the host.

    Attributes:
        takes_tensors: Whether `add` takes tensors, or arrays of the host.

    Raises:
        UsageError: torch knows no streams for the device.
        CodecError: The codec of the job has no form for it.
    """

    def __init__(
        self,
        session: Session,
        number: int,
        layout: Layout,
        decided: Callable[[Decide], None] | None,
        device: torch.device | None = None,
    ) -> None:
        self.exchange: Exchange
        trains = decided is not None
        sums: Sums
        if device is not None and on_device(device):
            streams_of(device)  # Refuses now what would fail in the middle of the first backward.
            self.exchange = DeviceExchange(session.client, number, layout, self._on_decided, trains=trains)
            sums = DeviceSums(layout, device)
        else:
            self.exchange = HostExchange(session.client, number, layout, self._on_decided, trains=trains)
            sums = HostSums(layout)
        self.takes_tensors = self.exchange.takes_tensors
        self.layout = layout
        self.done = threading.Event()
        self.joined = threading.Event()
        self.settled: Callable[[], bool] = lambda: True
        """Whether what was decided has reached its place; a wrapper knows."""
        self.rate: Callable[[], float] = session.training.rate
        self.start: StateBytes | None = None
        """Memory that holds the model's state, where it is not handed over as a blob: before the first round."""
        self.take: Callable[[], bytes] = lambda: b""
        """Returns the state after the last round, as bytes, for a worker that joins; a wrapper knows."""
        self.apply: Callable[[bytes], None] = lambda _: None
        """Takes over what `take` returned in another worker."""
        self.asked = START
        """After which round somebody wants the state; this worker makes it when it has begun the next."""
        self._making = False
        self._session = session
        self._decided = decided
        self._statistics = WindowStatistics(layout, parse_span(session.settings.regime.window), sums)
        self._rate = math.nan
        self._loss = math.nan
        self._begun = False
        self._said_skipped = False
        self._joined_at = -1
        session.client.on_failure(lambda _: self.done.set())
        session.client.on_failure(lambda _: self.joined.set())
        self._rates: list[Send] = []
        self._rate_due = 0.0
        self._reports: dict[int, tuple[Send, float]] = {}

    # ------------------------------------------------------------ the thread that computes gradients

    def add(self, tensor: int, gradient: Gradient, *, used: bool = True) -> None:
        """Hand over a gradient; see `Exchange.add`."""
        if not self._begun:
            self._begin_round()
            self.hand_out()
        if used and not self.layout.tensors[tensor].buffer:
            self._statistics.add(tensor, gradient)
        self.exchange.add(tensor, gradient, used=used)

    def _begin_round(self) -> None:
        self._session.refuse_closed("a gradient was to be sent")
        self._begun = True
        self.done.clear()
        self._session.meter.start()
        rate = self.rate()
        if rate != self._rate and not math.isnan(rate):
            # The scheduler has stepped by now, so the policy hears of a drop before the first push that uses it.
            self._rate = rate
            membership = self._session.client.membership
            message = m.Rate(membership.slot, membership.incarnation, self.exchange.number, self.exchange.rounds.round, rate)
            rates = [Send((COORDINATOR,), message)] * RATE_COPIES
            self._session.client.call(lambda: self._say(rates))

    def wait(self) -> str:
        """Wait until the round is decided; Ctrl-C gets through.

        Returns:
            What was decided: DATA or SKIP.

        Raises:
            PsAccordionError: The run has failed.
        """
        self._wait_for(self.done)
        return self._kind

    def _wait_for(self, event: threading.Event) -> None:
        client = self._session.client
        # An event of its own: who waits for a condition of the client wakes with every message.
        while not event.wait(1.0) and client.error is None:
            pass
        if client.error is not None:
            raise client.error

    def follow(self, batch_multiplier: int) -> None:
        """Do nothing: this worker leads those of its host."""

    def weigh(self, weight: float) -> None:
        """Let this worker's gradients count that much, from the next round on."""
        self.exchange.weight = weight

    def join(self, *, divide_by_initial_world_size: bool) -> None:
        """Take no part in the rounds to come, but go through them.

        Args:
            divide_by_initial_world_size: Whether the missing gradients count as zero in the mean, or not at all.
        """
        self.joined.clear()
        weight = self.exchange.weight if divide_by_initial_world_size else 0.0
        self._joined_at = self.exchange.rounds.round
        self._session.client.call(lambda: self.exchange.join(weight))

    def wait_for_join(self) -> int | None:
        """Wait until all others have come to the end of their data, too.

        Returns:
            A worker that was among the last to train, if this one was not, or is the one from whom the others may fetch.

        Raises:
            PsAccordionError: The run has failed.
        """
        self._wait_for(self.joined)
        lead = self.exchange.rounds.lead
        return None if self._joined_at == self.last_round and lead != self._session.slot else lead

    @property
    def last_round(self) -> int:
        """Number of the last round that was decided; -1 before the first."""
        return self.exchange.rounds.round - 1

    @property
    def batch_multiplier(self) -> int:
        """Batches that the next step takes, as the plan in force says."""
        return self.exchange.rounds.batch_multiplier

    @property
    def leads(self) -> bool:
        """Whether this worker's buffers are the ones for all."""
        return self.exchange.rounds.lead == self._session.client.membership.slot

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
            if decision.out:
                self._say_out()
            elif skipped:
                self._say_skipped(decision.round)
            report = self._statistics.finish_round(decision.round, rate=self._rate, loss=self._loss, skipped=skipped)
            self._report(report)
            if decision.round == UNMARKED_ROUNDS and self._statistics.waits_for_epoch:
                self._warn_of_epochs()
            # Who is in this round has what was handed out after the last join.
            self._session.client.donors.pop(self.exchange.number, None)
            self._kind = decision.kind
            if self._decided is not None:
                self._decided(decision)
            self.done.set()
        elif decision.kind != "END":
            # Windows are counted in rounds of the run: this worker has none to add, but the round has passed.
            self._report(self._statistics.finish_round(decision.round, rate=self._rate, loss=self._loss, skipped=True))
        if decision.kind == "JOIN":
            self.joined.set()  # last: whoever waits for it may look at what was reported

    def _report(self, report: Report | None) -> None:
        if report is None:
            return
        membership = self._session.client.membership
        message = m.Report(
            membership.slot, membership.incarnation, self.exchange.number, report.window, report.round, report.rate, report.loss
        )
        send = Send((COORDINATOR,), message, (report.norms.tobytes(),))

        def file() -> None:
            self._reports[report.window] = (send, 0.0)
            self.tick()  # at once: the next plan waits for it

        self._session.client.call(file)

    def _say(self, rates: list[Send]) -> None:
        self._rates, self._rate_due = rates, 0.0
        self.tick()

    # ------------------------------------------------------------ checkpoints

    @property
    def all_heard(self) -> bool:
        """Whether the coordinator has heard every report."""
        return not self._reports

    def state(self) -> tuple[dict[str, Any], torch.Tensor]:
        """Return what is measured of the open window: plain types, and the sums, float32[watched elements] on the host."""
        values, sums = self._statistics.state()
        return {"rate": self._rate, "loss": self._loss, "window": values}, sums

    def restore(self, state: dict[str, Any], sums: torch.Tensor) -> None:
        """Go on from what `state` returned, before the first round."""
        self._rate, self._loss = state["rate"], state["loss"]
        self._statistics.restore(state["window"], sums)

    # ------------------------------------------------------------ state for who joins

    def hand_out(self) -> None:
        """Make the state that somebody asked for, if this worker stands right behind the round that it is to be from.

        Called where nothing changes the model: when a round begins, and, on a thread of its own, while one is open. The round
        cannot be decided without the joiner, which is a member already.
        """
        exchange = self.exchange
        if self.asked <= START or self.asked != self.last_round or not exchange.has_state or self._making:
            return
        known = self._session.client.donors.get(exchange.number)
        if known is not None and known.round == self.asked:
            return
        self._making = True
        blob = Blob(packed(exchange.standing, self.take()))
        donor = Donor(exchange.number, self.asked, blob)
        self._session.client.call(lambda: self._handed_out(donor))

    def _handed_out(self, donor: Donor) -> None:
        self._making = False
        if donor.round == self.last_round:
            self._session.client.donors[self.exchange.number] = donor

    def wanted(self, get: m.Get) -> None:
        """Note that somebody asks for the state after a round; on the socket's thread."""
        self.asked = get.round
        if get.round == self.last_round and self.exchange.stands and not self._making:
            threading.Thread(target=self._hand_out_aside, name="ps-accordion-hand-out", daemon=True).start()

    def _hand_out_aside(self) -> None:
        try:
            self.hand_out()
        except BaseException as error:  # the joiner must not wait for a state that nobody makes
            self._session.client.fail(error)

    def _say_out(self) -> None:
        print(
            "ps-accordion: this worker was silent for too long, and the others have gone on without it; its last step is lost, "
            "and it takes over their state with the next",
            file=sys.stderr,
            flush=True,
        )

    def _say_skipped(self, round_: int) -> None:
        """Say once that rounds are skipped: who scales the loss without our knowledge should hear of it here, not from torch."""
        if self._said_skipped or self._session.training.scales:
            return
        self._said_skipped = True
        print(
            f"ps-accordion: round {round_} was skipped by all workers, because some gradient was not finite; nothing was "
            "changed. If a GradScaler scales the loss, let us know: session.track(optimizer, scaler=scaler)",
            file=sys.stderr,
            flush=True,
        )

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
        """Send reports until they are heard, and rates some times; on the socket's thread."""
        now = time.monotonic()
        if self._rates and now >= self._rate_due:
            self._rate_due = now + REPEAT_S
            self._session.client.carry([self._rates.pop()])
        for window, (send, due) in list(self._reports.items()):
            if now >= due:
                self._reports[window] = (send, now + REPEAT_S)
                self._session.client.carry([send])
