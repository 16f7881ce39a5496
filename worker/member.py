"""How a worker becomes a member and stays one: a state machine.

    joining ──welcome──> waiting for a view ──view──> greeting the servers ──all answered──> in ──a view without it──> out
       └── refused, aborted, or nobody answers ──> failed                                       ^──view──  joining anew <──┘

A worker that comes when the run has begun sees a view that does not name it, and asks for a place when its script is about to
train. One that was taken out, because it was silent for too long, does the same under a new incarnation.

Every step is repeated until the other side shows that it knows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import Buffer

from ps_accordion.config import Settings
from ps_accordion.errors import JoinRefused, RunAborted, RunOver, Unreachable, WireError
from ps_accordion.layout import Layout
from ps_accordion.selection import check as check_codecs
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Peer, Send
from ps_accordion.wire.framing import split_frames

from .pushes import server_name

__all__ = ["COORDINATOR", "Connect", "Membership"]

COORDINATOR = "coordinator"
REPEAT_S = 0.1
"""How often a join, a greeting or a declaration is repeated: they are small, and only sent while something is started."""


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a link."""

    name: str
    address: str


@dataclass
class _Declared:
    layout: Layout
    ready: bool = False
    begun: bool = False


class Membership:
    """This worker's place in the run.

    Args:
        settings: The settings of the job, as far as this process knows them.
        terms: What it was explicitly told of the agreed terms; the coordinator refuses it where they differ.
        slot: The rank that it asks for; -1 for any.
        token: Tells this process from all others.
        now: The time.
        restart: How often whoever started this process has started it again.
    """

    def __init__(self, settings: Settings, *, terms: dict[str, Any], slot: int, token: str, now: float, restart: int = 0) -> None:
        self.settings = settings
        self.slot = slot
        self.incarnation = -1
        self.view: m.View | None = None
        self.layouts: dict[int, _Declared] = {}
        self.progress: list[tuple[int, int, int]] = []
        """Round and plan version by layout, for the sign of life; the loop keeps it current."""
        self.synced = True
        """Whether this worker has the state after the last round; the loop keeps it current."""
        self.waits: list[int] = []
        """Layouts whose round has been pushed and is awaited; the loop keeps it current."""
        self.cut: Collection[str] = ()
        """Names of the links to servers that have no connection; the loop keeps it current."""
        self.wants_in = False
        """Whether the script is about to train, and this worker is in no view."""
        self.busy = ""
        """What this worker does instead of training; empty while it trains."""
        self.leaving: m.Leave | None = None
        self.released = False
        """Whether the coordinator has said that this worker may go, and the others go on."""
        self.gone = False
        self.over = False
        """Whether the coordinator has said that all workers have finished."""
        self._said_bye = False
        self._terms = terms
        self._token = token
        self._restart = restart
        self._born = now
        self.heard = now
        """When the coordinator last said anything."""
        self._repeat = now
        self._beat = now
        self._to_greet: set[str] = set()
        self.came_late = False
        """Whether the run had begun without it."""
        self._links: dict[str, str] = {}
        self._was_member = False

    @property
    def joined(self) -> bool:
        """Whether the coordinator has let this worker in."""
        return self.incarnation >= 0

    @property
    def inside(self) -> bool:
        """Whether it knows a view, and all servers have answered."""
        return self.view is not None and not self._to_greet

    @property
    def links(self) -> Collection[str]:
        """Names of the links to servers."""
        return self._links.keys()

    @property
    def member(self) -> bool:
        """Whether the last view names it."""
        return self.view is not None and self.joined and (self.slot, self.incarnation) in self.view.members

    @property
    def out(self) -> bool:
        """Whether it was taken out of the run: it comes in again only as another incarnation."""
        return self.joined and self._was_member and not self.member

    def cut_of(self, layout: int) -> int:
        """Return the first round of a layout that counts under the last view; 0 before the first."""
        return self.view.cut_of(layout)[0] if self.view is not None else 0

    # ------------------------------------------------------------ in

    def handle(self, peer: Peer, message: m.Message, _: Sequence[Buffer], now: float) -> list[Send | Connect]:
        """Take in a message.

        Raises:
            JoinRefused: The coordinator said no.
            CodecError: The job has a codec that this process does not.
            RunAborted: Another process failed.
        """
        if peer == COORDINATOR:
            self.heard = now
        match message:
            case m.Welcome() if message.token == self._token and not self.joined:
                self.slot, self.incarnation = message.slot, message.incarnation
                self.settings = self.settings.with_terms(message.terms)
                check_codecs(self.settings.codec)  # now that the coordinator can be told, and not at the first push
            case m.Refused() if message.token in ("", self._token):
                raise JoinRefused(f"the coordinator at {self.settings.coordinator.address} refused: {message.reason}")
            case m.View() if self.joined:
                # Not before the welcome, which says how many shards a server has: links are named by that. It is sent again.
                return self._on_view(message)
            case m.Hello():
                self._to_greet.discard(str(peer))
            case m.Ready() if message.layout in self.layouts:
                declared = self.layouts[message.layout]
                declared.ready = declared.layout.digest == message.digest
                declared.begun = message.begun
            case m.Leave() if message == self.leaving:
                self.released = True
            case m.Abort():
                self.gone = True
                if self.leaving is None:
                    raise RunAborted(f"the run has ended because of {message.culprit}: {message.reason}")
                return self.bye()
            case m.Ended():
                if not self.joined:
                    raise RunOver(
                        f"the run of the coordinator at {self.settings.coordinator.address} is over: all its workers have "
                        "finished; start a new run"
                    )
                self.gone = self.over = True
                # Who is in the view has an account to give, and that goes before the goodbye.
                return self.bye() if self.leaving is not None or not self.member else []
            case _:
                pass
        return []

    def garbage(self, error: WireError) -> None:
        """Take in frames from the coordinator that are no message of this protocol.

        Raises:
            JoinRefused: While joining, that is an answer too: another release, or not a coordinator.
        """
        if not self.joined:
            raise JoinRefused(f"what answers at {self.settings.coordinator.address} cannot be understood: {error}")

    def _on_view(self, view: m.View) -> list[Send | Connect]:
        if self.view is not None and view.p <= self.view.p:
            return []
        self.view = view
        self._was_member = self._was_member or self.member
        self.came_late = self.came_late or not self._was_member
        # The view that named it may never have come.
        removed = any((slot, incarnation) == (self.slot, self.incarnation) for slot, incarnation, _, _ in view.removed)
        self._was_member = self._was_member or removed
        links = {server_name(number, self.settings): address for number, _, address in view.shards}
        moved = {name: address for name, address in links.items() if self._links.get(name) != address}
        self._links = links
        self._to_greet = self._to_greet & links.keys() | moved.keys()
        return [Connect(name, address) for name, address in moved.items()]

    def bye(self) -> list[Send | Connect]:
        """Say, once, that this worker knows of the end, and has said all that it had to say."""
        if self._said_bye:
            return []
        self._said_bye = True  # It may be lost: the coordinator then waits a little longer before it ends.
        return [Send((COORDINATOR,), m.Bye(f"worker {self.slot}"))]

    # ------------------------------------------------------------ out

    def declare(self, number: int, layout: Layout) -> None:
        """Announce a layout, until the coordinator says that all hold it."""
        self.layouts[number] = _Declared(layout)
        self._repeat = 0.0  # now

    def ask_in(self, token: str, now: float) -> None:
        """Ask for a place in the next view; as a new incarnation, if this one was taken out.

        Args:
            token: Tells this attempt from all others.
            now: The time.
        """
        self.wants_in = True
        self._beat = 0.0
        if self.out:
            self._was_member = False
            self.incarnation, self._token, self._born = -1, token, now
            self._repeat = 0.0
            self._to_greet = set(self._links)  # servers tell members apart by what they were greeted as

    def greet_again(self, link: str) -> None:
        """Greet a server whose connection is new: it may be another process, which does not know whose it is."""
        if link in self._links:
            self._to_greet.add(link)
            self._repeat = 0.0

    def say_busy(self, what: str) -> None:
        """Say what this worker does instead of training; it travels with the next sign of life, which is due now."""
        self.busy = what
        self._beat = 0.0

    def leave_others(self, flushed: list[tuple[int, int]]) -> None:
        """Say goodbye to those that go on, until the coordinator has answered.

        Args:
            flushed: The round of each layout in which the residuals were handed over.
        """
        self.leaving, self.released = m.Leave(self.slot, self.incarnation, "", 0, early=True, flushed=flushed), False

    @property
    def finished(self) -> bool:
        """Whether this worker says goodbye because its rounds have ended, for all."""
        bye = self.leaving
        return bye is not None and not (bye.early or bye.error or bye.code)

    def leave(self, error: str, code: int) -> None:
        """Say goodbye, until the coordinator has answered."""
        # A message may hold undecodable bytes of a file name, as surrogates: they have no place in UTF-8.
        text = error[: m.MAX_TEXT].encode(errors="replace").decode()
        self.leaving = m.Leave(self.slot, self.incarnation, text, code)

    def tick(self, now: float) -> list[Send]:
        """Repeat what has not been answered; send signs of life.

        Raises:
            Unreachable: The coordinator has not been heard for too long.
        """
        self._check_silence(now)
        out: list[Send] = []
        if now >= self._repeat:
            self._repeat = now + REPEAT_S
            out += self._repeats()
        if self.joined and now >= self._beat:
            self._beat = now + self.settings.timeouts.heartbeat
            view = self.view.p if self.view is not None else -1
            if self.member:
                self.wants_in = False
            alive = m.Alive(
                self.slot, self.incarnation, view, self.progress, self.synced, self.finished, self.busy,
                self.wants_in, self.waits, self._cut_off(),
            )  # fmt: skip
            out.append(Send((COORDINATOR,), alive))
        return out

    def _cut_off(self) -> list[int]:
        """Return the numbers of the servers that this worker has no connection to."""
        shards = [] if self.view is None else [shard for shard, _, _ in self.view.shards]
        cut = (shard for shard in shards if server_name(shard, self.settings) in self.cut)
        return sorted({shard // self.settings.servers.shards_per_server for shard in cut})

    def _repeats(self) -> list[Send]:
        if not self.joined:
            return [Send((COORDINATOR,), m.Join(self._token, self.slot, self._terms, self._restart))]
        if self.leaving is not None:
            return [Send((COORDINATOR,), self.leaving)]
        greetings = tuple(sorted(self._to_greet))
        out = [Send(greetings, m.Hello(self.slot, self.incarnation))] if greetings else []
        for number, declared in self.layouts.items():
            if not declared.ready:
                declare = m.Declare(self.slot, self.incarnation, number, declared.layout.digest)
                out.append(Send((COORDINATOR,), declare, split_frames(declared.layout.table)))
        return out

    def _check_silence(self, now: float) -> None:
        limits, address = self.settings.timeouts, self.settings.coordinator.address
        if self.gone:
            return
        if not self.joined and now - self._born > limits.join:
            raise Unreachable(
                f"no coordinator has answered at {address} within {limits.join:g} s; start one with `ps-accordion coordinator`, "
                "or set coordinator.address (PS_ACCORDION_COORDINATOR_ADDRESS) to where it listens"
            )
        if self.joined and now - self.heard > limits.lost:
            raise Unreachable(f"the coordinator at {address} has not been heard for {limits.lost:g} s")
