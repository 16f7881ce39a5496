"""Runs the coordinator's machine on a socket until the run is over."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from ..config import Settings
from ..telemetry.events import JsonLines
from ..wire.actions import Action, Note, Send, Stop
from ..wire.transport import Transport, check_address
from .machine import Coordinator

__all__ = ["run"]

TICK_S = 0.1


def run(settings: Settings, *, transport: Transport | None = None, listening: Callable[[str], None] | None = None) -> int:
    """Run a coordinator until the run ends.

    Args:
        settings: The settings of the job.
        transport: Sockets to use; closed at the end. None makes new ones.
        listening: Called with the resolved address once it listens.

    Returns:
        The exit code: 0 when the run ended well.

    Raises:
        ConfigError: The address is malformed, in use, or reaches beyond this machine without `insecure`.
    """
    address = settings.coordinator.address
    check_address(address, insecure=settings.insecure, where="coordinator.address")
    transport = transport or Transport()
    events = JsonLines.of_role(settings.run.directory, "events", "coordinator")
    try:
        resolved = transport.listen(address, watch=True)
        if listening is not None:
            listening(resolved)
        events.write(event="start", address=resolved, workers=settings.workers.count, servers=settings.servers.count)
        machine = Coordinator(settings, time.monotonic())
        try:
            return _serve(machine, transport, events)
        except BaseException as error:  # the others must learn of it from us, not from our silence
            _carry(machine.crash(error, time.monotonic()), transport, events)
            raise
    finally:
        events.close()
        transport.close()


def _serve(machine: Coordinator, transport: Transport, events: JsonLines) -> int:
    due = time.monotonic() + TICK_S
    while True:
        actions: list[Action] = []
        for arrival in transport.poll(max(0.0, due - time.monotonic())):
            if arrival.lost:
                actions += machine.lost(arrival.peer, time.monotonic())
            elif arrival.error is not None:
                actions += machine.garbage(arrival.peer, arrival.error)
            elif arrival.message is not None:
                actions += machine.handle(arrival.peer, arrival.message, arrival.payload, time.monotonic())
        if time.monotonic() >= due:
            due = time.monotonic() + TICK_S
            actions += machine.tick(time.monotonic())
        stop = _carry(actions, transport, events)
        if stop is not None:
            return stop.code


def _carry(actions: list[Action], transport: Transport, events: JsonLines) -> Stop | None:
    """Carry actions out; return the one that ends the process, if it is among them."""
    for action in actions:
        if isinstance(action, Send):
            for peer in action.peers:
                transport.send(peer, action.message, action.payload)
        elif isinstance(action, Note):
            events.write(event=action.event, **action.fields)
            _say(action)
        else:
            return action
    return None


def _say(note: Note) -> None:
    """Tell people what they would otherwise wait for without knowing."""
    if note.event == "waiting":
        print(f"coordinator: waiting for {note.fields['missing']}, {note.fields['since_s']} s so far", file=sys.stderr)
    elif note.event == "gone":
        who = f"server {note.fields['server']}" if "server" in note.fields else f"worker {note.fields['slot']}"
        print(f"coordinator: {who} {note.fields['why']}", file=sys.stderr)
    elif note.event in ("error", "refused"):
        print(f"coordinator: {note.fields['reason']}", file=sys.stderr)
