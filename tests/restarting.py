"""A coordinator that can be killed between any two actions, for tests."""

import json

from coordinating import Job, server
from machines import BOOT

from ps_accordion.coordinator.machine import Coordinator
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Record, Send

__all__ = ["ACCORDION", "Durable", "training"]

ACCORDION = {"regime_policy": "accordion", "regime_interval": 1, "regime_window": "10 steps"}


class Durable(Job):
    """A job whose coordinator can be killed between any two actions, and is started again from what was recorded by then."""

    def __init__(self, **options) -> None:
        super().__init__(**({"workers_count": 3, "timeouts_dead": 4.0} | options))
        self.disk: list[str] = []
        self.die_after = -1
        """Actions until the coordinator is killed; negative while it is not to be."""

    def say(self, peer: bytes, message: m.Message, payload: bytes | None = None) -> list:
        return self.carried(super().say(peer, message, payload))

    def later(self, seconds: float) -> list:
        return self.carried(super().later(seconds))

    def carried(self, actions: list) -> list:
        """Put records on the disk in order; return the actions that were carried out."""
        done = []
        for action in actions:
            if self.die_after == 0:
                self.restart()
                return done
            self.die_after -= self.die_after > 0
            if isinstance(action, Record):
                self.disk.append(json.dumps(action.fields))
                assert json.loads(self.disk[-1]) == action.fields  # else the log would not take it
            if isinstance(action, Send):
                self.hear(action)
            done.append(action)
        if self.die_after == 0:
            self.restart()
        return done

    def hear(self, send: Send) -> None:
        """Take in what has been sent."""

    def restart(self) -> Coordinator:
        self.die_after = -1
        self.machine = Coordinator(self.settings, self.now, records=[json.loads(line) for line in self.disk])
        return self.machine

    def beat(self, *quiet: bytes) -> list:
        """Let all that the coordinator knows give signs of life, and a moment pass."""
        actions = []
        view = self.machine.run.number
        for slot, worker in sorted(self.machine.workers.items()):
            if b"w%d" % slot not in quiet:
                said = m.Alive(slot, worker.incarnation, view, [(0, 5, 0)], True, False)
                actions += self.say(b"w%d" % slot, said)
        for number in range(2):
            if b"s%d" % number not in quiet:
                actions += self.say(b"s%d" % number, server(number, view=view, layouts=[(0, self.layout.digest)]))
        return actions + self.later(0.5)

    def promise(self, p: int) -> list:
        done = [(0, 4, 1)]
        return [a for shard in range(2) for a in self.say(b"s%d" % shard, m.Frozen(p, shard, BOOT, 1, done))]


def training(**options) -> Durable:
    """Return a job in the middle of training."""
    job = Durable(**options)
    job.started().declared()
    return job
