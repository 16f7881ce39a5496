"""The layouts of a run at the coordinator: declared by every member, held by every server, and planned for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import Buffer

from ..checkpoint import Manifest
from ..config import Settings
from ..errors import LayoutError, RunAborted
from ..layout import Layout, read_table
from ..selection import lay_out
from ..wire import messages as m
from ..wire.actions import Action, Note, Peer, Send
from ..wire.framing import split_frames
from . import history
from .history import History, PastLayout
from .planning import Planner
from .roster import Server, Worker, peers_of

__all__ = ["LayoutEntry", "Layouts", "Resume"]


@dataclass(frozen=True)
class Resume:
    """What the coordinator reads of the checkpoint that a run goes on from.

    Attributes:
        manifest: Where each layout stands, and with which tensors.
        planners: State of each layout's planner.
    """

    manifest: Manifest
    planners: Mapping[int, dict[str, Any]]


@dataclass
class LayoutEntry:
    """A layout that some worker declared.

    Attributes:
        number: Its number.
        layout: The layout.
        planner: Makes its plans.
        declared: Slots whose declaration agreed, and where to answer them; None for who declared it to the coordinator before.
        opened: Whether its rounds have begun: every member had declared it, and every server held it.
        late: Slots that declared it after that.
        logged: Version of the last plan that may leave.
    """

    number: int
    layout: Layout
    planner: Planner
    declared: dict[int, Peer | None] = field(default_factory=dict)
    opened: bool = False
    late: set[int] = field(default_factory=set)
    logged: int = 0

    def held_by(self, server: Server) -> bool:
        """Whether `server` has said that it holds this layout."""
        return server.layouts.get(self.number) == self.layout.digest


class Layouts:
    """All layouts of a run.

    Args:
        settings: The settings of the job.
        past: What earlier coordinators of the run have logged.
        resume: The checkpoint that the run goes on from.
    """

    def __init__(self, settings: Settings, past: History, resume: Resume | None = None) -> None:
        self._settings = settings
        self._resume = resume
        self.entries = {number: self._recalled(number, layout) for number, layout in past.layouts.items()}

    def _recalled(self, number: int, past: PastLayout) -> LayoutEntry:
        layout = self._layout(past.table)
        planner = Planner.for_layout(number, layout, self._settings, last_version=past.version, last_rate=past.rate)
        declared = dict.fromkeys(sorted(past.declared))
        return LayoutEntry(number, layout, planner, declared, past.opened, set(past.late), past.version)

    def _layout(self, table: bytes) -> Layout:
        return lay_out(read_table(table), self._settings)

    @property
    def opened(self) -> list[int]:
        """Numbers of those whose rounds have begun."""
        return [number for number, entry in self.entries.items() if entry.opened]

    def declare(
        self, worker: Worker, peer: Peer, declare: m.Declare, payload: Sequence[Buffer], servers: Iterable[Server]
    ) -> list[Action]:
        """Take in a declaration.

        Raises:
            RunAborted: Another worker has declared another model under this number.
        """
        try:
            layout = self._layout(b"".join(payload))
        except LayoutError as error:
            return [_refused(peer, str(error))]
        if declare.digest != layout.digest:
            return [
                _refused(
                    peer, f"layout {declare.layout} has digest {declare.digest} at {worker.name} and {layout.digest} here, "
                    "from the same table; install the same release everywhere"
                )
            ]  # fmt: skip
        entry = self.entries.get(declare.layout)
        actions: list[Action] = []
        if entry is None:
            entry = LayoutEntry(declare.layout, layout, Planner.for_layout(declare.layout, layout, self._settings))
            self._take_up(worker, entry)
            self.entries[declare.layout] = entry
            note = {"layout": declare.layout, "digest": layout.digest, "tensors": len(layout.tensors), "keys": len(layout.keys)}
            actions += [history.layout(declare.layout, bytes(layout.table)), Note("layout", note), *_new_layout(entry, servers)]
        elif difference := entry.layout.difference(layout):
            first = min(entry.declared, default=declare.slot)
            raise RunAborted(
                f"{worker.name} and worker {first} hold different models (layout {declare.layout}): {difference}; "
                f"there means worker {first}, here {worker.name}. Build the same model in the same order in every worker"
            )
        if entry.opened and declare.slot not in entry.declared:
            entry.late.add(declare.slot)
            actions.append(history.late(declare.layout, declare.slot))
        entry.declared[declare.slot] = peer
        return actions

    def _take_up(self, worker: Worker, entry: LayoutEntry) -> None:
        """Have a new layout's planner go on from the checkpoint, if it has that layout."""
        at = self._resume.manifest.layout(entry.number) if self._resume is not None else None
        if self._resume is None or at is None:
            return
        if difference := self._layout(at.table).difference(entry.layout):
            raise RunAborted(
                f"{worker.name} holds another model than the checkpoint {self._settings.checkpoint.resume!r} (layout "
                f"{entry.number}): {difference}; there means in the checkpoint, here "
                f"{worker.name}. Build the model that was saved"
            )
        if (state := self._resume.planners.get(entry.number)) is not None:
            entry.planner.restore(state)

    def missing_at(self, server: Server) -> list[Action]:
        """Send a server the layouts that it does not hold."""
        return [action for entry in self.entries.values() if not entry.held_by(server) for action in _new_layout(entry, [server])]

    def open(self, members: Collection[int], servers: Collection[Server], *, again: int = -1) -> list[Action]:
        """Begin the rounds of layouts that every member has declared and every server holds, and tell those who wait.

        Args:
            members: Slots in the view; empty before the first.
            servers: All servers.
            again: A layout that somebody has declared just now, who has not heard yet.
        """
        actions: list[Action] = []
        for entry in self.entries.values():
            if entry.opened and entry.number != again:
                continue
            complete = bool(members) and set(members) <= entry.declared.keys()
            if (entry.opened or complete) and all(entry.held_by(server) for server in servers):
                if not entry.opened:
                    entry.opened = True
                    actions.append(history.opened(entry.number, entry.declared))
                for late in (False, True):
                    declared = [(slot, peer) for slot, peer in entry.declared.items() if (slot in entry.late) is late]
                    peers = tuple(peer for _, peer in declared if peer is not None)
                    if peers:
                        actions.append(Send(peers, m.Ready(entry.number, entry.layout.digest, late)))
        return actions

    def forget(self, slot: int) -> None:
        """Forget what the process in a slot has declared: another one has it now."""
        for entry in self.entries.values():
            entry.declared.pop(slot, None)
            entry.late.discard(slot)

    # ------------------------------------------------------------ plans

    def plans(self, entry: LayoutEntry, workers: Iterable[Worker], servers: Mapping[int, Server]) -> list[Action]:
        """Return what there is to tell of an entry's plans: notes, and the newest one until every member reports it."""
        notes: list[Action] = [Note("plan", event) for event in entry.planner.events()]
        return notes + self.pending(entry, workers, servers)

    def pending(self, entry: LayoutEntry, workers: Iterable[Worker], servers: Mapping[int, Server]) -> list[Action]:
        """Hand a plan to the server with key 0 until every member reports it."""
        pending = entry.planner.pending([worker.plans.get(entry.number, 0) for worker in workers])
        server = servers.get(entry.layout.keys[0].shard // self._settings.servers.shards_per_server)
        if pending is None or server is None or server.peer is None:
            return []
        version, plan = pending
        actions: list[Action] = []
        if version > entry.logged:
            entry.logged = version
            actions.append(history.planned(entry.number, version, entry.planner.last_rate))
        return [*actions, Send((server.peer,), m.NewPlan(entry.number, version), (plan,))]


def _new_layout(entry: LayoutEntry, servers: Iterable[Server]) -> list[Action]:
    """Return the message that has servers hold a layout."""
    peers = peers_of(servers)
    return [Send(peers, m.NewLayout(entry.number, entry.layout.digest), split_frames(entry.layout.table))] if peers else []


def _refused(peer: Peer, reason: str) -> Send:
    return Send((peer,), m.Refused("", reason[: m.MAX_TEXT]))
