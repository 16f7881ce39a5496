"""The coordinator and servers, in thin loops around the real state machines."""

from unittest import mock

from process import SHARD_POINTS, Process

from ps_accordion import crashpoints
from ps_accordion.coordinator.machine import Coordinator
from ps_accordion.layout import read_table
from ps_accordion.selection import lay_out
from ps_accordion.server.durable import ShardStore, Snapshots
from ps_accordion.server.relay import Relay
from ps_accordion.server.shard import Shard
from ps_accordion.wire import messages as m
from ps_accordion.worker.member import COORDINATOR

__all__ = ["CoordinatorProcess", "ServerProcess"]


class CoordinatorProcess(Process):
    """The coordinator."""

    kind = "coordinator"
    machine_class = Coordinator

    def __init__(self, world, number):
        super().__init__(world, number)
        self.log = world.disks.setdefault(self.name, [])
        self.machine = self.machine_class(world.settings, world.now, records=self.log)

    def receive(self, source, message, payload):
        self._carry(self.machine.handle(source.encode(), message, payload, self.world.now))

    def tick(self):
        self._carry(self.machine.tick(self.world.now))

    def lost(self, name):
        self._carry(self.machine.lost(name.encode(), self.world.now))

    def logged(self, what):
        if what == "view":  # one that is not, nobody has heard of: who is started next may make another
            view = self.machine.view
            known = self.world.views.setdefault(view.p, view)
            assert known == view, ("two views with one number", known, view)

    def _carry(self, actions):
        if any(isinstance(getattr(action, "message", None), m.Abort) for action in actions):
            # Who has finished does not apply what others learn after it: with the last that does, the state is gone.
            self.world.holders = [worker.name for worker in self.world.alive("worker") if worker.has_state]
        stop = self.carry(actions, "c.sent_some")
        if stop is not None and stop.code:
            self.world.over = stop.reason

    def describe(self):
        machine = self.machine
        return (
            self.name,
            machine.phase,
            machine.view and (machine.view.p, machine.view.members, machine.view.cuts),
            machine.views.proposal,
        )


class WatchedShard(Shard):
    """A shard that tells which lost residuals it made again, and which it goes on without."""

    world = None

    def _restored(self, layout, record, kept, again):
        super()._restored(layout, record, kept, again)
        cut, key, replayed = record.round + 1, record.key.number, self.world.replayed
        replayed -= {(since, of) for since, of in replayed if of == key and since > cut}  # those rounds are made again
        if again is not None and (cut, key) not in self.world.begun_anew:
            replayed.add((cut, key))
        else:  # what a replay finds is then that there is nothing
            replayed.discard((cut, key))
            self.world.begun_anew.add((cut, key))
        self.world.begun_anew -= {(since, of) for since, of in self.world.begun_anew if of == key and since > cut}
        self.world.count["residuals begun anew" if again is None else "residuals replayed"] += 1


class ServerProcess(Process):
    """A server with one shard."""

    kind = "server"
    shard_class = WatchedShard

    def __init__(self, world, number):
        super().__init__(world, number)
        self.shard = self._shard()
        self.relay = Relay()
        self.layouts = self.shard.layouts
        self.beat = 0.0

    def _shard(self):
        store = self.world.disks.get(self.name)
        if store is None:
            store = self.world.disks[self.name] = ShardStore.open(None, shard=self.number, job="")
        copies = self.world.snapshots.setdefault(self.name, Snapshots(None, shard=self.number, job=""))
        made = self.shard_class(self.number, store.boot, self.world.settings, store=store, snapshots=copies)
        made.world = self.world
        return made

    def receive(self, source, message, payload):
        with mock.patch.object(crashpoints, "reach", self._reach):
            self._receive(source, message, payload)

    def _receive(self, source, message, payload):
        shard, peer = self.shard, source.encode()
        match message:
            case m.View():
                self._carry(shard.on_view(message))
                if shard.epoch == message.p:  # one that has promised a later view would be told of this one again, without end
                    self._alive()
            case m.Freeze():
                self._carry(shard.on_freeze(message))
            case m.NewLayout():
                layout = lay_out(read_table(b"".join(bytes(part) for part in payload)), self.world.settings)
                self.layouts[message.layout] = layout
                self._carry(shard.on_layout(message.layout, layout))
                self._alive()
            case m.NewPlan():
                self._carry(shard.on_plan(message.layout, message.version, bytes(payload[0])))
            case m.Push():
                self.relay.heard(peer, message.slot)
                self._carry(shard.on_push(peer, message, payload))
            case m.Restore():
                self._carry(shard.on_restore(message, payload))
            case m.Offer():
                self._carry(shard.on_offer(peer, message))
            case m.Replay():
                self._carry(shard.on_replay(peer, message, payload))
            case m.Ask():
                self.relay.heard(peer, message.slot)
                self._carry(shard.on_ask(peer, message))
            case m.Hello():
                self._carry(self.relay.hello(peer, message))
            case m.Get():
                self._carry(self.relay.get(peer, message))
            case m.State():
                self._carry(self.relay.state(message, payload))

    def _reach(self, point):
        if point in SHARD_POINTS:
            self.world.point(self, point)
        else:
            self.world.reach(self, point)

    def _carry(self, actions):
        for action in actions:
            assert not isinstance(getattr(action, "message", None), m.Refuse), action.message.reason
            if getattr(action, "event", "") == "replay differs":
                self.world.differing.append((self.name, action.fields))
        self.carry(actions, "s.sent_some")

    def tick(self):
        if self.world.now >= self.beat:
            self._alive()

    def _alive(self):
        self.beat = self.world.now + self.world.settings.timeouts.heartbeat
        terms = self.world.terms if self.shard.epoch < 0 else {}
        layouts = [(number, layout.digest) for number, layout in self.layouts.items()]
        shards = [(self.number, self.shard.boot)]
        self.post(COORDINATOR, m.ServerAlive(self.number, f"tcp://{self.name}", shards, layouts, self.shard.epoch, terms))

    def describe(self):
        records = {key: (record.round, record.epoch, sorted(record.open)) for (_, key), record in self.shard.records.items()}
        return self.name, self.shard.epoch, self.shard.promise, records
