"""Whatever a coordinator was doing and wherever its records end: whoever starts it again goes on from them."""

import json
import random

import numpy as np
from coordinating import everybody, server
from hypothesis import given
from hypothesis import strategies as st
from machines import BOOT, TABLE, sends
from restarting import ACCORDION, Durable, training

from ps_accordion.coordinator.history import History
from ps_accordion.coordinator.machine import Coordinator
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Send


class World(Durable):
    """Workers and shards that do what real ones would, by chance, and hold the coordinator to its word."""

    def __init__(self, seed: int) -> None:
        super().__init__(workers_count=2, **ACCORDION)
        self.chance = random.Random(seed)
        self.tokens: dict[str, tuple[int, int]] = {}
        self.plans: dict[int, bytes] = {}
        self.views: dict[int, m.View] = {}
        self.asked = 0
        self.over: m.Message | None = None
        self.lives = [0, 0]
        self.incarnation = [-1, -1]
        self.ready = [False, False]
        self.seen = [-1, -1]
        """The last view that each worker has."""
        self.epoch, self.promised = [-1, -1], [-1, -1]
        self.crashes = 0

    def restart(self) -> Coordinator:
        self.crashes += 1
        machine = super().restart()
        assert machine.run.number >= max(self.views, default=-1)
        assert History.of(json.loads(line) for line in self.disk).proposed >= self.asked
        assert machine.run.incarnations >= max((i for _, i in self.tokens.values()), default=0)
        if self.over is not None:
            assert machine.over == self.over
        return machine

    def hear(self, send: Send) -> None:
        message = send.message
        match message:
            case m.Welcome():
                place = self.tokens.setdefault(message.token, (message.slot, message.incarnation))
                assert place == (message.slot, message.incarnation)
                assert len({incarnation for _, incarnation in self.tokens.values()}) == len(self.tokens)
                if message.token == self.token(message.slot):
                    self.incarnation[message.slot] = message.incarnation
            case m.View():
                assert self.views.setdefault(message.p, message) == message
                for peer in send.peers:
                    number = int(peer[1:])
                    if peer[:1] == b"w":
                        self.seen[number] = max(self.seen[number], message.p)
                    elif message.p > self.epoch[number] and message.p >= self.promised[number]:
                        self.epoch[number] = message.p
            case m.Freeze():
                assert message.p > max(self.views)
                self.asked = max(self.asked, message.p)
                for peer in send.peers:
                    number = int(peer[1:])
                    self.promised[number] = max(self.promised[number], message.p)
            case m.NewPlan():
                assert self.plans.setdefault(message.version, bytes(send.payload[0])) == bytes(send.payload[0])
            case m.Ended() | m.Abort():
                assert self.over in (None, message)
                self.over = message
            case _:
                pass

    def token(self, slot: int) -> str:
        return f"{slot} {self.lives[slot]}"

    def worker(self, slot: int) -> None:
        peer, layout = b"w%d" % slot, self.layout
        if self.incarnation[slot] < 0:
            self.say(peer, m.Join(self.token(slot), slot, {}, self.lives[slot]))
            return
        view = self.views.get(self.seen[slot])
        member = view is not None and (slot, self.incarnation[slot]) in view.members
        wants = not member and view is not None
        said = m.Alive(slot, self.incarnation[slot], self.seen[slot], [(0, 5, 0)], member, False, "", wants)
        self.say(peer, said)
        self.say(peer, m.Declare(slot, self.incarnation[slot], 0, layout.digest), layout.table)

    def shard(self, number: int) -> None:
        held = [(0, self.layout.digest)] if self.views else []
        self.say(b"s%d" % number, server(number, view=self.epoch[number], layouts=held))
        if self.promised[number] > self.epoch[number]:
            done = [(0, 4, 1)] if self.epoch[number] > 0 else []
            self.say(b"s%d" % number, m.Frozen(self.promised[number], number, BOOT, self.epoch[number], done))

    def all_speak(self) -> None:
        for number in range(2):
            self.worker(number)
            self.shard(number)
        self.later(0.4)

    def anything(self) -> None:
        """Do one thing, by chance."""
        what = self.chance.choice(["speak"] * 4 + ["worker", "shard", "report", "dies", "crash", "crash", "tick"])
        number = self.chance.randrange(2)
        if what == "speak":
            self.all_speak()
        elif what == "worker":
            self.worker(number)
        elif what == "shard":
            self.shard(number)
        elif what == "report" and self.views:
            norms = np.full(len(TABLE), 10.0, np.float32).tobytes()
            window = len(self.plans)
            message = m.Report(number, max(0, self.incarnation[number]), 0, window, 10 * window + 9, 0.1, 1.0)
            self.say(b"w%d" % number, message, norms)
        elif what == "dies" and min(self.incarnation) > 0 and len(self.machine.run.members()) == 2:
            if all(worker.peer is not None for worker in self.machine.run.members()):
                self.machine.lost(b"w%d" % number, self.now)
            self.lives[number] += 1
            self.incarnation[number], self.seen[number] = -1, -1
        elif what == "crash":
            self.die_after = self.chance.randrange(12)
        else:
            self.later(0.2)


@given(st.integers(0, 1 << 32))
def test_any_history_cut_anywhere_can_be_gone_on_from(seed):
    """It never contradicts itself, and in the end everybody is in a view that no shard has promised to wait beyond.

    Workers die, shards promise, plans are made, and the coordinator is killed between any two actions.
    """
    world = World(seed)
    for _ in range(60):
        world.anything()
    world.die_after = -1
    for _ in range(30):
        world.all_speak()
    if world.over is not None:
        assert isinstance(world.over, m.Abort)
        assert "nobody else has the model's state" in world.over.reason or "before all had the parameters" in world.over.reason
        return
    view = world.machine.view
    assert view.members == sorted((slot, world.incarnation[slot]) for slot in range(2))
    assert world.epoch == [view.p] * 2
    assert max(world.promised) <= view.p
    assert world.machine.views.aim == dict(view.members)


def test_any_beginning_of_the_records_is_a_state_to_go_on_from():
    """The log may end after any record: nobody has been told what is behind it."""
    world = World(7)
    for _ in range(200):
        world.anything()
    kinds = [json.loads(line)["what"] for line in world.disk]
    assert {"joined", "layout", "opened", "proposed", "view", "planned"} <= set(kinds)
    for length in range(len(world.disk) + 1):
        records = [json.loads(line) for line in world.disk[:length]]
        machine = Coordinator(world.settings, 0.0, records=records)
        assert machine.phase in ("gathering", "running")
        machine.tick(0.1)
        joined = [record for record in records if record["what"] == "joined"]
        if joined:
            latest = joined[-1]
            again = m.Join(latest["token"], latest["slot"], {}, latest["restart"])
            assert sends(machine.handle(b"x", again, [], 0.2), m.Welcome)[0].message.incarnation == latest["incarnation"]


def test_everybody_is_reached_again():
    """When all have been heard, the end goes to all."""
    job = training()
    job.restart()
    assert job.machine.run.everybody() == ()
    job.beat()
    assert set(job.machine.run.everybody()) == everybody(job)
