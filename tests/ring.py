"""A whole run inside one process: real roles, real sockets on loopback, a thread for each role."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ps_accordion import config
from ps_accordion.codecs import warm
from ps_accordion.config import Settings
from ps_accordion.coordinator import loop as coordinator_loop
from ps_accordion.selection import used
from ps_accordion.server.loop import Server
from ps_accordion.wire.transport import Transport
from ps_accordion.worker.session import Session

__all__ = ["Ring", "run_ring"]


class Ring:
    """A coordinator and servers, each on a thread, and worker functions on further threads.

    Args:
        overrides: Settings by dotted name.
        transport: Makes the sockets of each role, called with its name ("coordinator", "server 0", "worker 1").
    """

    def __init__(self, overrides: dict[str, Any], transport: Callable[[str], Transport] = lambda name: Transport()) -> None:
        base = {"coordinator.address": "tcp://127.0.0.1:*", "timeouts.join": 30, "timeouts.heartbeat": 0.2, "timeouts.grace": 2}
        self._settings = config.load(environment={}, overrides=base | overrides)
        # Compiling takes longer than a role waits for another; a real server compiles before it says that it is there.
        warm(used(self._settings.codec))
        self._transport = transport
        self.errors: list[BaseException] = []
        self.codes: dict[str, int] = {}
        self._threads: list[threading.Thread] = []

    @property
    def settings(self) -> Settings:
        """The settings of the job, with the coordinator's real address."""
        return self._settings

    def run(self, work: Callable[[Session], Any]) -> list[Any]:
        """Run `work` in every worker; return what each returned, by rank.

        Raises:
            BaseException: The first error of any role, once all have ended.
        """
        listening = threading.Event()

        def resolved(address: str) -> None:
            self._settings = config.load(
                environment={}, overrides=config.flatten(self._settings) | {"coordinator.address": address}
            )
            listening.set()

        def coordinator() -> int:
            try:
                return coordinator_loop.run(self._settings, transport=self._transport("coordinator"), listening=resolved)
            finally:
                listening.set()

        self._start("coordinator", coordinator)
        listening.wait()
        for number in range(self._settings.servers.count):
            self._start(f"server {number}", lambda number=number: self._server(number))
        results: list[Any] = [None] * self._settings.workers.count
        for rank in range(self._settings.workers.count):
            self._start(f"worker {rank}", lambda rank=rank: self._worker(rank, work, results))
        for thread in self._threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
        return results

    def _server(self, number: int) -> int:
        return Server(self._settings, number, transport=self._transport(f"server {number}")).run()

    def _worker(self, rank: int, work: Callable[[Session], Any], results: list[Any]) -> int:
        with Session(self._settings, rank=rank, threads=1, transport=self._transport(f"worker {rank}")) as session:
            results[rank] = work(session)
        return 0

    def _start(self, name: str, role: Callable[[], int]) -> None:
        def main() -> None:
            try:
                self.codes[name] = role()
            except BaseException as error:
                self.errors.append(error)

        thread = threading.Thread(target=main, name=name)
        self._threads.append(thread)
        thread.start()


def run_ring(work: Callable[[Session], Any], **overrides: Any) -> list[Any]:
    """Run `work` in every worker of a fresh ring. Underscores in option names stand for dots: `workers_count=3`."""
    sections = {
        name.replace("_", ".", 1) if not name.startswith("insecure") else name: value for name, value in overrides.items()
    }
    return Ring(sections).run(work)
