"""Runs one server: a thread that owns the sockets, and a thread that computes for each shard.

Pushes are handed to the shard that owns their key; what it answers is packed there too, and only sent here. So receiving,
folding, encoding and sending of different keys overlap, and no sum needs a lock.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from typing_extensions import Buffer

from ps_accordion import checkpoint, crashpoints
from ps_accordion.codecs import warm
from ps_accordion.config import Settings, job_of
from ps_accordion.errors import JoinRefused, RunAborted, Unreachable, WireError
from ps_accordion.layout import Layout, read_table
from ps_accordion.selection import check as check_codecs
from ps_accordion.selection import lay_out, used
from ps_accordion.telemetry import trace
from ps_accordion.telemetry.events import JsonLines
from ps_accordion.telemetry.trace import Trace
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Action, Peer, Send
from ps_accordion.wire.addresses import check_address
from ps_accordion.wire.lane import Loan
from ps_accordion.wire.lending import Lending
from ps_accordion.wire.silence import Absence, Silence
from ps_accordion.wire.transport import Arrival, Transport

from .checkpoint import Residuals, save
from .durable import ShardStore, Snapshots
from .relay import Relay
from .shard import COORDINATOR, Shard
from .thread import ShardThread

__all__ = ["Server", "run"]

GARBAGE_LIMIT = 3
"""Unreadable messages in a row that one member may send: a checksum fails by chance once in years, three times never."""
NORMS_S = 1.0
"""How old the norm of a residual may be that is lost with its shard."""


class Server:
    """One server process.

    Args:
        settings: The settings of the job.
        number: Number of this server.
        transport: Sockets to use; closed at the end. None makes new ones.

    Raises:
        CodecError: The job has a codec that this process does not.
    """

    def __init__(self, settings: Settings, number: int, *, transport: Transport | None = None) -> None:
        check_codecs(settings.codec)  # now, not when a push comes
        self.settings = settings
        self.number = number
        self.view = -1
        self._transport = transport or Transport()
        self._transport.lending = Lending(on=settings.servers.lane == "auto")
        self._events = JsonLines.of_role(settings.run.directory, "events", "server", number)
        self._trace = Trace(settings.run.directory if settings.run.trace else "", "server", number)
        self._relay = Relay()
        self._layouts: dict[int, Layout] = {}
        self._garbage: dict[Peer, int] = {}
        self._heard: float | None = None
        self._norms_due = 0.0
        self._silence = Silence(settings.timeouts.heartbeat)
        self._over: m.Ended | m.Abort | None = None
        self._address = ""
        self._stores: dict[int, ShardStore] = {}
        self._snapshots: dict[int, Snapshots] = {}
        self._threads: dict[int, ShardThread] = {}
        self._said_saved: dict[int, m.Saved] = {}
        """The answer for the last checkpoint, by shard; each shard's thread has its own entry."""

    def run(self, *, listening: Callable[[str], None] | None = None) -> int:
        """Serve until the run is over; return the exit code.

        Args:
            listening: Called with the resolved address once the server listens.

        Raises:
            ConfigError: The address is malformed, in use, or reaches beyond this machine without `insecure`; or the state
                directory is another job's, held by another process, or not ours to write.
            StorageError: There is no room for the state, or the disk fails.
            Unreachable: The coordinator does not answer.
            JoinRefused: It said no.
            RunAborted: Another process failed.
        """
        bind = self.settings.servers.bind.replace("{number}", str(self.number))
        check_address(bind, insecure=self.settings.insecure, where="servers.bind")
        try:
            self._open_stores()
            self._address = self._transport.listen(bind)
            self._transport.connect(COORDINATOR, self.settings.coordinator.address)
            if listening is not None:
                listening(self._address)
            warm(used(self.settings.codec))
            resume = self.settings.checkpoint.resume
            restore = Residuals(Path(resume)).restored if resume else None
            for number, store in self._stores.items():
                snapshots = self._snapshots.get(number)
                shard = Shard(
                    number,
                    store.boot,
                    self.settings,
                    store=store,
                    restore=restore,
                    snapshots=snapshots,
                    trace=self._trace,
                    take=self._transport.lending.take,
                )
                self._threads[number] = ShardThread(shard, self._transport, self._events)
            self._recall()
            self._events.write(event="start", address=self._address, shards=list(self._threads), view=self.view, lost=self._lost)
            self._serve()
        finally:
            for thread in self._threads.values():
                thread.close()
            self._record()
            self._close_stores()
            self._events.close()
            self._trace.close()
            self._transport.close()
        if isinstance(self._over, m.Abort):
            raise RunAborted(f"the run has ended because of {self._over.culprit}: {self._over.reason}")
        return 0

    def _open_stores(self) -> None:
        """Open the memory of each shard: what a process before this one has left there, or a new one."""
        per_server, directory = self.settings.servers.shards_per_server, self.settings.state_directory
        job = job_of(self.settings)
        for number in range(self.number * per_server, (self.number + 1) * per_server):
            self._stores[number] = ShardStore.open(Path(directory) if directory else None, shard=number, job=job)
            if self.settings.snapshot_directory:
                self._snapshots[number] = Snapshots(Path(self.settings.snapshot_directory), shard=number, job=job)

    def _close_stores(self) -> None:
        for number, store in self._stores.items():
            if number in self._threads:
                self._threads[number].shard.close()
            if self._over is None:
                store.close()
            else:
                store.discard()
        for snapshots in self._snapshots.values():
            if self._over is None:
                snapshots.close()
            else:
                snapshots.discard()
        if self._over is not None and self.settings.state_directory:
            with contextlib.suppress(OSError):  # others' are there still
                Path(self.settings.state_directory).rmdir()

    def _recall(self) -> None:
        """Know what all shards have kept of the layouts and views."""
        shards = [thread.shard for thread in self._threads.values()]
        self.view = min(shard.epoch for shard in shards)
        self._layouts = {
            number: layout for number, layout in shards[0].layouts.items() if all(number in shard.layouts for shard in shards)
        }

    @property
    def _lost(self) -> str:
        texts = [store.lost for store in self._stores.values()] + [copies.lost for copies in self._snapshots.values()]
        return "; ".join(filter(None, texts))

    def _serve(self) -> None:
        limits = self.settings.timeouts
        born = due = time.monotonic()
        beat = 0.0
        absence = Absence(born)
        while self._over is None:
            arrivals = self._transport.poll(max(0.0, due - time.monotonic()))
            if (away := absence.look(time.monotonic())) and self._heard is not None:
                self._heard += away
            began = trace.now()
            for arrival in arrivals:
                self._dispatch(arrival)
            if arrivals:
                self._trace.span("messages", began, count=len(arrivals))
            now = time.monotonic()
            if now < due:
                continue
            due = now + min(0.1, limits.heartbeat)
            if now >= beat or self._heard is None:
                beat = now + limits.heartbeat
                self._alive()
            for note in self._silence.look({} if self._heard is None else {COORDINATOR: self._heard}, now):
                self._events.write(event=note.event, **note.fields)
            silent = now - (born if self._heard is None else self._heard)
            if silent > (limits.join if self._heard is None else limits.lost):
                raise Unreachable(
                    f"no coordinator has answered at {self.settings.coordinator.address} for {silent:.0f} s; start one with "
                    "`ps-accordion coordinator`, or set coordinator.address to where it listens"
                )
        for thread in self._threads.values():
            thread.close()
        entries = [(number, *thread.shard.account()) for number, thread in self._threads.items()]
        self._transport.send(COORDINATOR, m.Books(self.number, entries, whole=self._whole(), boots=self._boots()))
        self._transport.send(COORDINATOR, m.Bye(f"server {self.number}"))

    def _alive(self) -> None:
        shards = self._boots()
        terms = self.settings.terms() if self.view < 0 else {}
        layouts = [(number, layout.digest) for number, layout in self._layouts.items()]
        lost = self._lost[: m.MAX_TEXT]
        self._transport.send(COORDINATOR, m.ServerAlive(self.number, self._address, shards, layouts, self.view, terms, lost))
        now = time.monotonic()
        if now >= self._norms_due:
            self._norms_due = now + NORMS_S
            norms = [(number, *thread.shard.norm()) for number, thread in self._threads.items()]
            self._transport.send(COORDINATOR, m.Books(self.number, norms=norms, whole=self._whole()))

    def _boots(self) -> list[tuple[int, int]]:
        return [(number, thread.shard.boot) for number, thread in self._threads.items()]

    def _whole(self) -> list[tuple[int, int]]:
        return [(number, thread.shard.boot) for number, thread in self._threads.items() if thread.shard.whole]

    def _dispatch(self, arrival: Arrival) -> None:
        if isinstance(arrival.posted, BaseException):
            reason = f"{type(arrival.posted).__name__}: {arrival.posted}"
            self._events.write(event="error", reason=reason)
            self._transport.send(COORDINATOR, m.Fault(self.number, f"server {self.number}", reason[: m.MAX_TEXT]))
            raise arrival.posted
        if arrival.posted is not None:
            peers, frames = arrival.posted
            for place, peer in enumerate(peers):
                if place == 1:
                    crashpoints.reach("s.sent_some")
                self._transport.send_frames(peer, frames)
        elif arrival.error is not None:
            self._on_garbage(arrival.peer, arrival.error)
        elif arrival.message is not None:
            if arrival.peer == COORDINATOR:
                self._heard = time.monotonic()
                self._from_coordinator(arrival.message, arrival.payload)
            else:
                self._from_worker(arrival.peer, arrival.message, arrival.payload, arrival.loan)

    def _on_garbage(self, peer: Peer, error: WireError) -> None:
        """Log what cannot be read. It is as good as lost; who sends nothing else breaks the run, and is named."""
        sender = self._relay.name_of(peer)
        self._events.write(event="garbage", sender=sender or repr(peer), reason=str(error))
        if peer == COORDINATOR and self._heard is None:
            raise JoinRefused(f"what answers at {self.settings.coordinator.address} cannot be understood: {error}")
        if not sender:
            return  # anybody may knock; only members are counted, so that the count cannot grow without end
        self._garbage[peer] = self._garbage.get(peer, 0) + 1
        if self._garbage[peer] >= GARBAGE_LIMIT:  # said again with every further one, because this may be lost too
            reason = (
                f"{self._garbage[peer]} messages of {sender} without a readable push between them are refused; the last: {error}"
            )
            self._transport.send(COORDINATOR, m.Fault(self.number, sender, reason[: m.MAX_TEXT]))

    def _from_coordinator(self, message: m.Message, payload: Sequence[Buffer]) -> None:
        match message:
            case m.View():
                self.view = max(self.view, message.p)
                self._to_all(lambda shard: shard.on_view(message))
                self._alive()
            case m.Freeze():
                self._to_all(lambda shard: shard.on_freeze(message))
            case m.NewLayout() if message.layout not in self._layouts and payload:
                layout = lay_out(read_table(b"".join(payload)), self.settings)
                if layout.digest != message.digest:
                    raise JoinRefused(
                        f"layout {message.layout} has digest {message.digest} at the coordinator and {layout.digest} here; give "
                        "this server the coordinator's settings"
                    )
                self._layouts[message.layout] = layout
                self._to_all(lambda shard: shard.on_layout(message.layout, layout))
                self._alive()
            case m.NewPlan() if message.layout in self._layouts and payload:
                plan = bytes(payload[0])
                owner = self._threads.get(self._layouts[message.layout].keys[0].shard)
                if owner is not None:
                    owner.submit(lambda shard: shard.on_plan(message.layout, message.version, plan))
            case m.Save():
                self._to_all(lambda shard: self._saved(shard, message))
            case m.Refused():
                raise JoinRefused(f"the coordinator at {self.settings.coordinator.address} refused: {message.reason}")
            case m.Ended() | m.Abort():
                self._over = message
            case _:
                pass

    def _saved(self, shard: Shard, request: m.Save) -> list[Action]:
        """Write a shard's part of a checkpoint, on its thread; who asks again gets the same answer."""
        said = self._said_saved.get(shard.number)
        if said is None or (said.step, said.attempt) != (request.step, request.attempt) or said.error:
            said = save(shard, request, checkpoint.partial(Path(self.settings.checkpoint_directory), request.step))
            if said is None:
                return []
            self._said_saved[shard.number] = said
        return [Send((COORDINATOR,), said)]

    def _from_worker(self, peer: Peer, message: m.Message, payload: Sequence[Buffer], loan: Loan | None) -> None:
        actions: list[Action] = []
        match message:
            case m.Push():
                self._garbage.pop(peer, None)
                self._relay.heard(peer, message.slot)
                owner = self._owner(message.layout, message.key)
                if owner is not None:
                    owner.submit(lambda shard: shard.on_push(peer, message, payload, loan))
            case m.Restore():
                owner = self._owner(message.result.layout, message.result.key)
                if owner is not None:
                    owner.submit(lambda shard: shard.on_restore(message, payload))
            case m.Offer():
                for thread in self._threads.values():
                    if thread.shard.boot == message.boot:
                        thread.submit(lambda shard: shard.on_offer(peer, message))
            case m.Replay():
                owner = self._owner(message.push.layout, message.push.key)
                if owner is not None:
                    owner.submit(lambda shard: shard.on_replay(peer, message, payload))
            case m.Ask():
                self._relay.heard(peer, message.slot)
                self._to_all(lambda shard: shard.on_ask(peer, message))
            case m.Hello():
                actions = self._relay.hello(peer, message)
            case m.Lane():
                actions = [*self._transport.lending.on_lane(peer, message)]
            case m.Get():
                actions = self._relay.get(peer, message)
            case m.State():
                actions = self._relay.state(message, payload)
            case _:
                self._events.write(event="unexpected", peer=str(peer), message=type(message).__name__)
        for action in actions:
            if isinstance(action, Send):
                for other in action.peers:
                    self._transport.send(other, action.message, action.payload)

    def _owner(self, layout: int, key: int) -> ShardThread | None:
        """Return the thread that owns a key; None where the layout is not known yet, or the key is not ours."""
        keys = self._layouts[layout].keys if layout in self._layouts else ()
        return self._threads.get(keys[key].shard) if key < len(keys) else None

    def _to_all(self, task: Callable[[Shard], list[Action]]) -> None:
        for thread in self._threads.values():
            thread.submit(task)

    def _record(self) -> None:
        """Write the residuals that the run leaves, for a replay."""
        if not (self.settings.run.record_gradients and self.settings.run.directory):
            return
        directory = Path(self.settings.run.directory) / "record" / f"server-{self.number}"
        directory.mkdir(parents=True, exist_ok=True)
        for thread in self._threads.values():
            for (layout, key), record in thread.shard.records.items():
                np.save(directory / f"residual-{layout}-{key}.npy", record.residual())


def run(settings: Settings, number: int) -> int:
    """Run server `number` in the foreground until the run is over; return its exit code."""
    server = Server(settings, number)
    code = server.run()
    sys.stdout.flush()
    return code
