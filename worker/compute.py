"""Threads that encode and decode, each owning its keys: no lock on a residual, and one key's work stays in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from ps_accordion.cores import keep_apart
from ps_accordion.pace import Pace

__all__ = ["CodecThreads"]

TOGETHER = 8
"""Tasks after which whoever waits for their outcome is woken at the latest, if more are queued. Waking costs a quarter of what
encoding a partition does at each process on the way; this many partitions are encoded in 5 to 10 ms, and go out as one message
a server."""


class CodecThreads:
    """Runs tasks in order for each key.

    Args:
        count: Threads.
        failed: Called, on the thread, with an exception that a task raised.
        done: Called, on the thread, after some tasks, and always before it waits for more.
    """

    def __init__(self, count: int, failed: Callable[[BaseException], None], done: Callable[[], None]) -> None:
        self._failed = failed
        self._done = done
        self._queues: list[queue.SimpleQueue[Callable[[], None] | None]] = [queue.SimpleQueue() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._run, args=(tasks, index), name=f"ps-accordion-codec-{index}", daemon=True)
            for index, tasks in enumerate(self._queues)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, key: int, task: Callable[[], None]) -> None:
        """Run `task` on the thread that owns `key`, after all that was submitted for it before."""
        self._queues[key % len(self._queues)].put(task)

    def drain(self) -> None:
        """Wait until everything that was submitted before is done."""
        reached = [threading.Event() for _ in self._queues]
        for tasks, event in zip(self._queues, reached, strict=True):
            tasks.put(event.set)
        for event in reached:
            event.wait()

    def close(self) -> None:
        """End the threads when they have done what is queued."""
        for tasks in self._queues:
            tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, tasks: queue.SimpleQueue[Callable[[], None] | None], index: int) -> None:
        keep_apart(index, len(self._queues))
        pace = Pace(TOGETHER)
        while (task := tasks.get()) is not None:
            try:
                task()
            except BaseException as error:  # handed to whoever waits; a thread has nobody else to tell
                self._failed(error)
            # A task holds views of gradients; do not keep the last one while idle.
            del task
            if pace.hand_on(idle=tasks.empty()):
                self._done()
