"""Runs the coordinator's machine on a socket until the run is over."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from .. import checkpoint
from ..config import Settings, job_of
from ..crashpoints import reach
from ..errors import StorageError
from ..telemetry.events import JsonLines
from ..wire import messages as m
from ..wire.actions import Action, Note, Record, Send, Stop
from ..wire.addresses import check_address
from ..wire.silence import Absence
from ..wire.transport import Transport
from .checkpoints import Due
from .layouts import Resume
from .log import Log
from .machine import Coordinator

__all__ = ["LOGGED", "carry_out", "run"]

TICK_S = 0.1
PLANNERS = "coordinator.msgpack"
"""The coordinator's own part of a checkpoint."""
STATE = "state"
"""Folder of the run directory with what a process needs that is started again."""
LEAVE_S = 0.1
"""Time for a message to leave, where a test kills this process after it."""
LOGGED = {"proposed": "c.proposed", "view": "c.view_logged", "planned": "c.plan_logged", "over": "c.over_logged"}
"""Crash points behind records, by what is recorded."""


def run(settings: Settings, *, transport: Transport | None = None, listening: Callable[[str], None] | None = None) -> int:
    """Run a coordinator until the run ends.

    Args:
        settings: The settings of the job.
        transport: Sockets to use; closed at the end. None makes new ones.
        listening: Called with the resolved address once it listens.

    Returns:
        The exit code: 0 when the run ended well.

    Raises:
        ConfigError: The address is malformed, in use, or reaches beyond this machine without `insecure`; or another coordinator
            has the log of this run directory, or it is of another job.
        StorageError: The log is damaged, or cannot be read or written.
    """
    address = settings.coordinator.address
    check_address(address, insecure=settings.insecure, where="coordinator.address")
    transport = transport or Transport()
    events = JsonLines.of_role(settings.run.directory, "events", "coordinator")
    directory = Path(settings.run.directory) / STATE if settings.run.directory else None
    try:
        # First the log: its lock keeps two coordinators of one job from ever being heard side by side.
        with Log.open(directory, job=job_of(settings)) as log:
            machine = Coordinator(settings, time.monotonic(), records=log.records, resume=_resume(settings))
            resolved = transport.listen(address, watch=True)
            if listening is not None:
                listening(resolved)
            counts = {"workers": settings.workers.count, "servers": settings.servers.count}
            events.write(event="start", address=resolved, term=log.term, view=machine.run.number, **counts)
            try:
                return _serve(machine, transport, events, log)
            except BaseException as error:  # the others must learn of it from us, not from our silence
                actions = machine.crash(error, time.monotonic())
                if isinstance(error, StorageError):  # nothing can be recorded any more; whoever hears the end ends all the same
                    actions = [action for action in actions if not isinstance(action, Record)]
                carry_out(actions, transport, events, log)
                raise
    finally:
        events.close()
        transport.close()


def _serve(machine: Coordinator, transport: Transport, events: JsonLines, log: Log) -> int:
    due = time.monotonic() + TICK_S
    absence = Absence(time.monotonic())
    while True:
        actions: list[Action] = []
        arrivals = transport.poll(max(0.0, due - time.monotonic()))
        if away := absence.look(time.monotonic()):
            actions += machine.away(away, time.monotonic())
        for arrival in arrivals:
            if arrival.lost:
                actions += machine.lost(arrival.peer, time.monotonic())
            elif arrival.error is not None:
                actions += machine.garbage(arrival.peer, arrival.error)
            elif arrival.message is not None:
                actions += machine.handle(arrival.peer, arrival.message, arrival.payload, time.monotonic())
        if time.monotonic() >= due:
            due = time.monotonic() + TICK_S
            actions += machine.tick(time.monotonic())
        if (ready := machine.checkpoints.due) is not None:
            actions += machine.checkpoints.kept(*_keep(ready, machine.settings), time.monotonic())
        stop = carry_out(actions, transport, events, log)
        if stop is not None:
            return stop.code


def _resume(settings: Settings) -> Resume | None:
    """Read the checkpoint that the job goes on from, if one is set.

    Raises:
        ConfigError: There is none, or it is of another job.
        StorageError: It is damaged.
    """
    if not settings.checkpoint.resume:
        return None
    path = Path(settings.checkpoint.resume)
    manifest = checkpoint.read(path)
    manifest.refuse_other_terms(settings.terms(), where=path)
    manifest.refuse_other_workers(settings.workers.count, where=path)
    planners = checkpoint.read_part(path, checkpoint.part_named(manifest, PLANNERS, where=path))
    return Resume(manifest, msgspec.msgpack.decode(planners, type=dict[int, dict[str, Any]]))


def _keep(due: Due, settings: Settings) -> tuple[str, int, str]:
    """Complete a checkpoint on the disk; return where it is, its bytes, and why it is not there (empty where it is)."""
    root = Path(settings.checkpoint_directory)
    try:
        own = checkpoint.write_part(checkpoint.partial(root, due.manifest.step), PLANNERS, due.planners)
        manifest = msgspec.structs.replace(due.manifest, parts=[*due.manifest.parts, own])
        path = checkpoint.commit(root, manifest, keep=settings.checkpoint.keep)
    except StorageError as error:
        return "", 0, str(error)
    return str(path), manifest.nbytes, ""


def carry_out(actions: Iterable[Action], transport: Transport, events: JsonLines, log: Log) -> Stop | None:
    """Carry actions out in order; return the one that ends the process, if it is among them.

    Raises:
        StorageError: A record cannot be put on the disk; nothing that follows it has been sent.
    """
    for action in actions:
        if isinstance(action, Send):
            _send(action, transport)
        elif isinstance(action, Note):
            # On one machine all processes have this clock, so the launcher can tell who was first; the other one may be set.
            clock = {"monotonic": round(time.monotonic(), 6)} if action.event == "error" else {}
            events.write(event=action.event, **action.fields, **clock)
            _say(action)
        elif isinstance(action, Record):
            log.append(action.fields)
            reach(LOGGED.get(action.fields["what"], ""))
        else:
            return action
    return None


def _send(send: Send, transport: Transport) -> None:
    for position, peer in enumerate(send.peers):
        transport.send(peer, send.message, send.payload)
        if position == 0 and len(send.peers) > 1 and isinstance(send.message, m.View):
            reach("c.view_sent_some", after=LEAVE_S)
    if isinstance(send.message, m.Welcome):
        reach("c.welcomed", after=LEAVE_S)


def _say(note: Note) -> None:
    """Tell people what they would otherwise wait for without knowing."""
    if note.event == "waiting":
        print(f"coordinator: waiting for {note.fields['missing']}, {note.fields['since_s']} s so far", file=sys.stderr)
    elif note.event == "resumed":
        print(f"coordinator: the rounds go on, after {note.fields['after_s']:.0f} s", file=sys.stderr)
    elif note.event == "leave" and note.fields.get("early"):
        print(f"coordinator: worker {note.fields['slot']} leaves; what it had not sent is handed over", file=sys.stderr)
    elif note.event == "gone":
        who = f"server {note.fields['server']}" if "server" in note.fields else f"worker {note.fields['slot']}"
        print(f"coordinator: {who} {note.fields['why']}", file=sys.stderr)
    elif note.event == "ledger" and (note.fields["workers"] or note.fields["wrong"]):
        print(f"coordinator: {note.fields['text']}", file=sys.stderr)
    elif note.event == "lost" and note.fields["who"].startswith("shard"):
        print(f"coordinator: residual lost: {note.fields['text']}", file=sys.stderr)
    elif note.event == "found":
        print(f"coordinator: {note.fields['who']} has every bit of its residuals again", file=sys.stderr)
    elif note.event == "silent":
        print(f"coordinator: {note.fields['name']} has not been heard for {note.fields['since_s']:.0f} s", file=sys.stderr)
    elif note.event == "heard":
        print(f"coordinator: {note.fields['name']} is heard again, after {note.fields['after_s']:.0f} s", file=sys.stderr)
    elif note.event == "checkpoint":
        size, seconds = note.fields["nbytes"] / 1e6, note.fields["seconds"]
        print(f"coordinator: checkpoint of step {note.fields['step']}: {size:.1f} MB in {seconds:.2f} s, {note.fields['path']}")
        sys.stdout.flush()
    elif note.event == "no checkpoint":
        print(f"coordinator: no checkpoint of step {note.fields['step']}: {note.fields['reason']}", file=sys.stderr)
    elif note.event in ("error", "refused"):
        print(f"coordinator: {note.fields['reason']}", file=sys.stderr)
