"""The thread that computes for a shard. What the shard answers is packed here, and only sent by the thread of the sockets."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from ps_accordion.pace import Pace
from ps_accordion.telemetry.events import JsonLines
from ps_accordion.wire.actions import Action, Note, Peer, Send
from ps_accordion.wire.bundle import Part, bundled
from ps_accordion.wire.transport import Transport

from .shard import Shard

__all__ = ["ShardThread"]

Task = Callable[[Shard], list[Action]]
TOGETHER = 4
"""Tasks of a shard after which what is ready is sent at the latest, if more are queued: several results as one message."""


class ShardThread:
    """One shard and the thread that computes for it."""

    def __init__(self, shard: Shard, transport: Transport, events: JsonLines) -> None:
        self.shard = shard
        self._transport = transport
        self._events = events
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._ready: dict[tuple[Peer, ...], list[Part]] = {}
        self._thread = threading.Thread(target=self._run, name=f"ps-accordion-shard-{shard.number}", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> None:
        """Let the shard take in an event, after all that came before."""
        self._tasks.put(task)

    def close(self) -> None:
        """End the thread when it has done what is queued."""
        self._tasks.put(None)
        self._thread.join()

    def _run(self) -> None:
        pace = Pace(TOGETHER)
        while (task := self._tasks.get()) is not None:
            try:
                for action in task(self.shard):
                    if isinstance(action, Send):
                        self._ready.setdefault(action.peers, []).append((action.message, action.payload))
                    elif isinstance(action, Note):
                        self._events.write(event=action.event, **action.fields)
            except BaseException as error:  # the run must end with the true cause, not hang for want of a result
                self._transport.post(error)
                return
            if pace.hand_on(idle=self._tasks.empty()):
                self._hand_over()

    def _hand_over(self) -> None:
        """Let the thread of the sockets send what is ready: what goes to the same members is packed once for all of them."""
        ready, self._ready = self._ready, {}
        lending = self._transport.lending
        for peers, parts in ready.items():
            here = tuple(peer for peer in peers if lending.reads(peer))
            away = tuple(peer for peer in peers if peer not in here)
            for some, said in ((here, map(lending.lent, parts)), (away, parts)):
                for frames in bundled(said) if some else ():
                    self._transport.post((some, frames), wake=False)
        if ready:
            self._transport.wake()
