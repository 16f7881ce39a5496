"""A coordinator with a clock and whoever has joined it, for tests of the state machine."""

from machines import BOOT, layout_of, sends, settings_of

from ps_accordion.coordinator.machine import Coordinator
from ps_accordion.wire import messages as m

__all__ = ["Job", "alive", "answers", "everybody", "join", "leave", "server"]


def join(slot: int, *, token: str = "", **terms) -> m.Join:
    return m.Join(token or f"token {slot}", slot, terms)


def server(number: int, *, view: int = -1, boot: int = BOOT, layouts=(), shards=None) -> m.ServerAlive:
    """Return a sign of life of a server with one shard."""
    shards = [(number, boot)] if shards is None else shards
    return m.ServerAlive(number, f"tcp://127.0.0.1:{5000 + number}", shards, list(layouts), view)


def alive(slot: int, *, view: int = 1, version: int = 0, incarnation: int = 0, busy: str = "") -> m.Alive:
    return m.Alive(slot, incarnation or slot + 1, view, [(0, 0, version)], True, False, busy)


def leave(slot: int, error: str = "", code: int = 0) -> m.Leave:
    return m.Leave(slot, slot + 1, error, code)


def answers(actions, peer: bytes) -> list[m.Message]:
    """Return what is sent to one peer."""
    return [send.message for send in sends(actions) if peer in send.peers]


class Job:
    """A coordinator with a clock, and whoever has joined it."""

    def __init__(self, **options) -> None:
        self.settings = settings_of(**({"servers_count": 2, "regime_policy": "static"} | options))
        self.layout = layout_of(self.settings)
        self.now = 100.0
        self.machine = Coordinator(self.settings, self.now)

    def say(self, peer: bytes, message: m.Message, payload: bytes | None = None) -> list:
        return self.machine.handle(peer, message, [] if payload is None else [payload], self.now)

    def started(self) -> "Job":
        """Let everybody join, in slot order."""
        for slot in range(self.settings.workers.count):
            self.say(b"w%d" % slot, join(slot))
        for number in range(self.settings.servers.count):
            self.say(b"s%d" % number, server(number))
        assert self.machine.phase == "running"
        return self

    def declared(self) -> "Job":
        """Let every worker declare the same model, and every server hold it."""
        for slot in range(self.settings.workers.count):
            self.declare(slot)
        for number in range(self.settings.servers.count):
            self.say(b"s%d" % number, server(number, view=1, layouts=[(0, self.layout.digest)]))
        return self

    def declare(self, slot: int, layout=None, number: int = 0) -> list:
        layout = layout or self.layout
        return self.say(b"w%d" % slot, m.Declare(slot, slot + 1, number, layout.digest), layout.table)

    def later(self, seconds: float) -> list:
        self.now += seconds
        return self.machine.tick(self.now)


def everybody(job: Job) -> set[bytes]:
    workers = {b"w%d" % slot for slot in range(job.settings.workers.count)}
    return workers | {b"s%d" % number for number in range(job.settings.servers.count)}
