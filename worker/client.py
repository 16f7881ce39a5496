"""A worker's own thread: it owns the sockets, and moves messages between them and the state machines."""

from __future__ import annotations

import contextlib
import functools
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from ps_accordion.config import Settings
from ps_accordion.errors import RunOver, Unreachable, WireError
from ps_accordion.layout import Layout
from ps_accordion.telemetry import trace
from ps_accordion.telemetry.events import JsonLines
from ps_accordion.telemetry.trace import Trace
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Note, Peer, Send
from ps_accordion.wire.framing import join_frames
from ps_accordion.wire.lending import Lending
from ps_accordion.wire.silence import Absence, Silence
from ps_accordion.wire.transport import Arrival, Transport

from .accounting import Accounting
from .compute import CodecThreads
from .exchange import Exchange
from .member import COORDINATOR, Connect, Membership
from .overdue import Overdue
from .record import Record
from .restoring import Restoring
from .transfer import Donor, Joiner

__all__ = ["Client"]

GARBAGE_LIMIT = 3
"""Unreadable messages in a row that one server may send: a checksum fails by chance once in years, three times never."""
TICK_S = 0.02
"""How late a repetition may be. Heartbeats and questions are due in tenths of a second and more."""


class Client:
    """Sockets, threads and state machines of one worker.

    The thread starts at once and joins the run; `wait` tells when it is in.

    Args:
        settings: The settings of the job, as far as this process knows them.
        slot: The rank to ask for; -1 for any.
        threads: Codec threads.
        transport: Sockets to use; closed at the end. None makes new ones.
        restart: How often whoever started this process has started it again.
    """

    def __init__(
        self, settings: Settings, *, slot: int, threads: int, transport: Transport | None = None, restart: int = 0
    ) -> None:
        self.membership = Membership(
            settings,
            terms=settings.explicit_terms(),
            slot=slot,
            token=secrets.token_hex(16),
            now=time.monotonic(),
            restart=restart,
        )
        self.error: BaseException | None = None
        self.exchanges: dict[int, Exchange] = {}
        self.donors: dict[int, Donor] = {}
        self.joiners: dict[int, Joiner] = {}
        self.accounting = Accounting(self.membership)
        self.restoring = Restoring(self.membership, self.exchanges)
        self.events = JsonLines(None)
        self.record = Record(None)
        self.trace = Trace()
        self.transport = transport or Transport()
        self.transport.lending = Lending(on=settings.servers.lane == "auto")
        self.codecs = CodecThreads(threads, self.fail, self.transport.wake)
        self._garbage: dict[Peer, int] = {}
        self._broken: set[str] = set()
        """Links to servers that have no connection."""
        self._overdue = Overdue()
        self._silence = Silence(settings.timeouts.heartbeat)
        self.state_bytes = 0
        """Bytes of the model's initial state that this worker has handed to others: start-up, whenever they ask."""
        self._on_tick: list[Callable[[], None]] = []
        self._on_heard: list[Callable[[m.Heard], None]] = []
        self._on_kept: list[Callable[[m.Kept], None]] = []
        self._on_wanted: list[Callable[[m.Get], None]] = []
        self._on_failure: list[Callable[[BaseException], None]] = []
        self._changed = threading.Condition()
        self._waiting = 0
        self._stopping = False
        self.transport.connect(COORDINATOR, settings.coordinator.address)
        self._thread = threading.Thread(target=self._run, name="ps-accordion-io", daemon=True)
        self._thread.start()

    @property
    def settings(self) -> Settings:
        """The settings of the job; complete once the worker has joined."""
        return self.membership.settings

    @property
    def behind(self) -> bool:
        """Whether this worker has to take over where the others stand, before it can take part in a round."""
        return not self.membership.member or any(exchange.behind for exchange in list(self.exchanges.values()))

    # ------------------------------------------------------------ any thread

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` on the thread that owns the sockets."""
        self.transport.post(function)

    def run(self, function: Callable[[], None]) -> None:
        """Run `function` on the thread that owns the sockets, and wait until it has.

        Raises:
            PsAccordionError: The run has failed meanwhile.
        """

        def work() -> None:
            function()
            done.set()

        done = threading.Event()
        self.call(work)
        while not done.wait(1.0):
            if self.error is not None:
                raise self.error

    def call_soon(self, function: Callable[[], None]) -> None:
        """Do the same from a task of a codec thread, which wakes the other one after some of them."""
        self.transport.post(function, wake=False)

    def fail(self, error: BaseException) -> None:
        """End this worker's part in the run because of `error`. The first error is the one that counts."""
        self.call(lambda: self._fail(error))

    def on_failure(self, callback: Callable[[BaseException], None]) -> None:
        """Call `callback`, on the socket's thread, when the run fails, or at once if it has."""

        def add() -> None:
            self._on_failure.append(callback)
            if self.error is not None:
                callback(self.error)

        self.call(add)

    def on_tick(self, callback: Callable[[], None]) -> None:
        """Call `callback`, on the socket's thread, some times a second."""
        self._on_tick.append(callback)

    def on_heard(self, callback: Callable[[m.Heard], None]) -> None:
        """Call `callback`, on the socket's thread, when the coordinator has heard a report."""
        self._on_heard.append(callback)

    def on_kept(self, callback: Callable[[m.Kept], None]) -> None:
        """Call `callback`, on the socket's thread, when the coordinator says what has become of a checkpoint."""
        self._on_kept.append(callback)

    def on_wanted(self, callback: Callable[[m.Get], None]) -> None:
        """Call `callback`, on the socket's thread, when a state is asked for that nobody has handed out yet."""
        self._on_wanted.append(callback)

    def ask_in(self) -> None:
        """Ask for a place in the next view."""
        self.call(lambda: self.membership.ask_in(secrets.token_hex(16), time.monotonic()))

    def wait(self, condition: Callable[[], bool], what: str, timeout: float | None = None) -> None:
        """Wait until `condition` holds; Ctrl-C gets through.

        Raises:
            Unreachable: `timeout` seconds have passed.
            RunOver: The run has ended.
            PsAccordionError: The run has failed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._noticing():
            while not condition():
                if self.error is not None:
                    raise self.error
                if self.membership.gone:
                    raise RunOver(f"the run is over while this worker waits for {what}: all its workers have finished")
                left = 1.0 if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    raise Unreachable(f"waited {timeout:g} s for {what}")
                self._changed.wait(min(1.0, left))

    def notice(self, seconds: float) -> None:
        """Wait up to `seconds` for something to happen."""
        with self._noticing():
            self._changed.wait(seconds)

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        """Hold the condition, and let the other thread know that somebody waits: else it does not notify."""
        with self._changed:
            self._waiting += 1
            try:
                yield
            finally:
                self._waiting -= 1

    def open(self, number: int, layout: Layout, exchange: Exchange) -> None:
        """Declare a layout and wait until every worker has, and every shard holds it."""
        membership = self.membership

        def declare() -> None:
            exchange.rounds.view = membership.view
            exchange.rounds.out = not membership.member
            self.exchanges[number] = exchange
            membership.declare(number, layout)

        self.call(declare)
        self.wait(
            lambda: number in membership.layouts and membership.layouts[number].ready,
            "all workers to declare the same model",
            self.settings.timeouts.join,
        )
        if membership.layouts[number].begun or not membership.member:
            exchange.behind = True

    def close(self) -> None:
        """End the threads and close the sockets. Closing twice is harmless."""
        if self._thread.is_alive():
            self.call(self._stop)
            self._thread.join()
        self.codecs.close()
        self.events.close()
        self.trace.close()

    # ------------------------------------------------------------ the thread that owns the sockets

    def carry(self, actions: Iterable[Send | Connect | Note]) -> None:
        """Carry out what a machine asked for."""
        for action in actions:
            if isinstance(action, Send):
                # Pushes come by the dozen, and several are ready for one server as a rule.
                send = self.transport.send_soon if isinstance(action.message, m.Push) else self.transport.send
                for peer in action.peers:
                    send(peer, action.message, action.payload)
            elif isinstance(action, Connect):
                self.transport.connect(action.name, action.address)
                self.transport.lending.begin(action.name, action.address)
            else:
                self.events.write(event=action.event, **action.fields)

    def _stop(self) -> None:
        self._stopping = True

    def _fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
            for callback in self._on_failure:
                try:
                    callback(error)
                except Exception as second:  # the others must still hear of the first
                    self.events.write(event="error", reason=f"while failing: {type(second).__name__}: {second}")

    def _run(self) -> None:
        due = time.monotonic()
        absence = Absence(due)
        try:
            while not self._stopping:
                arrivals = self.transport.poll(max(0.0, due - time.monotonic()))
                self.membership.heard += absence.look(time.monotonic())
                began = trace.now()
                for arrival in arrivals:
                    self._guarded(functools.partial(self._dispatch, arrival))
                if arrivals:
                    self.trace.span("messages", began, count=len(arrivals))
                if time.monotonic() >= due:
                    due = time.monotonic() + TICK_S
                    self._guarded(self._tick)
                if self._waiting:
                    with self._changed:
                        self._changed.notify_all()
        except BaseException as error:  # a broken socket must not leave the user's thread waiting
            self._fail(error)
        finally:
            self.transport.close()

    def _guarded(self, function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:  # whatever it is, the user's thread must learn of it
            self._fail(error)

    def _dispatch(self, arrival: Arrival) -> None:
        if arrival.posted is not None:
            arrival.posted()
        elif arrival.error is not None:
            self._on_garbage(arrival)
        elif arrival.message is not None:
            self._handle(arrival)

    def _on_garbage(self, arrival: Arrival) -> None:
        assert arrival.error is not None
        self.events.write(event="garbage", sender=str(arrival.peer), reason=str(arrival.error))
        if arrival.peer == COORDINATOR:
            self.membership.garbage(arrival.error)
            return
        self._garbage[arrival.peer] = self._garbage.get(arrival.peer, 0) + 1
        if self._garbage[arrival.peer] >= GARBAGE_LIMIT:
            raise WireError(
                f"{GARBAGE_LIMIT} messages from {arrival.peer!r} with no readable result between them; the last: {arrival.error}"
            )

    def _handle(self, arrival: Arrival) -> None:
        now, message = time.monotonic(), arrival.message
        match message:
            case m.Result() if message.layout in self.exchanges:
                self._garbage.pop(arrival.peer, None)
                try:
                    self.exchanges[message.layout].on_result(message, arrival.payload, arrival.loan)
                except WireError as error:
                    raise WireError(f"from {arrival.peer!r}: {error}") from None
            case m.Missing() if message.layout in self.exchanges:
                self.carry(self.exchanges[message.layout].rounds.on_missing(message, now))
            case m.Freeze():
                self.carry(self.restoring.on_freeze(message))
            case m.Recall() if isinstance(arrival.peer, str):
                self.carry(self.restoring.on_recall(arrival.peer, message, now))
            case m.Lane():
                self.carry(self.transport.lending.on_lane(arrival.peer, message))
            case m.Heard():
                for heard in self._on_heard:
                    heard(message)
            case m.Kept():
                for keep in self._on_kept:
                    keep(message)
            case m.Refuse():
                raise WireError(f"{arrival.peer!r} refused what this worker sent: {message.reason}")
            case m.Get():
                self._on_get(arrival.peer, message)
            case m.State() if message.layout in self.joiners:
                joiner = self.joiners[message.layout]
                joiner.on_state(message, join_frames(arrival.payload, message.frames))
                self.carry(joiner.tick(now))
            case m.Abort():
                self.transport.send(COORDINATOR, m.Bye(f"worker {self.membership.slot}"))
                self.carry(self.membership.handle(arrival.peer, message, arrival.payload, now))
            case _ if message is not None:
                self._to_membership(arrival, message, now)

    def _to_membership(self, arrival: Arrival, message: m.Message, now: float) -> None:
        membership, before = self.membership, self.membership.view
        self.carry(membership.handle(arrival.peer, message, arrival.payload, now))
        view = membership.view
        if view is None or view is before:
            return
        self.events.write(event="view", p=view.p, members=view.members, cuts=view.cuts, member=membership.member)
        for joiner in self.joiners.values():
            joiner.ask(view.donor)
        for exchange in self.exchanges.values():
            exchange.on_view(view, now, member=membership.member)
        self.carry(self.restoring.on_view(now))

    def _on_get(self, peer: Peer, get: m.Get) -> None:
        donor = self.donors.get(get.layout)
        if donor is None or donor.round != get.round:
            for wanted in self._on_wanted:
                wanted(get)
            return
        before = self.transport.sent_bytes
        self.carry(donor.on_get(peer, get))
        self.state_bytes += self.transport.sent_bytes - before

    def _tick(self) -> None:
        now = time.monotonic()
        self.membership.progress = [
            (number, exchange.rounds.round, exchange.rounds.plan_version) for number, exchange in self.exchanges.items()
        ]
        self.membership.waits = [number for number, exchange in self.exchanges.items() if exchange.rounds.waits]
        self._look_at_links(now)
        self.membership.cut = self._broken
        self._note_silence(now)
        # The account goes before the goodbye: who has heard that does not listen any more.
        self.carry(self.accounting.tick(self.exchanges.values(), now))
        # After a failure too: until the user's thread has come back and says why, this worker is not silent.
        self.carry(self.membership.tick(now))
        self.carry(self.transport.lending.tick(now))
        if self.events.on:
            self.carry(self.transport.lending.news())
        if self.error is None:
            for exchange in self.exchanges.values():
                self.carry(exchange.rounds.tick(now))
            self.carry(self.restoring.tick(now))
            for joiner in self.joiners.values():
                self.carry(joiner.tick(now))
            membership, exchanges = self.membership, self.exchanges.values()
            complete = all(joiner.complete for joiner in self.joiners.values()) and all(each.has_state for each in exchanges)
            membership.synced = complete and membership.member and (bool(exchanges) or not membership.came_late)
            for callback in self._on_tick:
                callback()

    def _note_silence(self, now: float) -> None:
        """Log whom this worker has waited for, or not heard, for some heartbeats."""
        heard = self._overdue.look(self.exchanges, now)
        if self.membership.joined:
            heard[COORDINATOR] = self.membership.heard
        for note in self._silence.look(heard, now):
            self.events.write(event=note.event, **note.fields)

    def _look_at_links(self, now: float) -> None:
        """Notice which servers have been away and are back: whoever is there now may be a process that was started again."""
        for link in self.membership.links:
            if self.transport.broke(link) or not self.transport.linked(link):
                self._broken.add(link)  # one that broke has a moment in which it does not know that yet, so it is back later
            elif link in self._broken:
                self._broken.discard(link)
                self.membership.greet_again(link)
                self.transport.lending.begin_again(link)
                for exchange in self.exchanges.values():
                    exchange.rounds.ask_again(link, now)
