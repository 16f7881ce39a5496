"""A whole run of the real state machines in one thread and virtual time: scheduler, network, faults, and what happened.

Nothing here is a model of the protocol: coordinator, shards, memberships, rounds, exchanges and codecs are those of the package;
`servers.py` and `workers.py` have the thin loops around them. A seed is one run, and replays exactly: all that is random follows
from it.
"""

import contextlib
import functools
import heapq
import itertools
import random
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
from machines import layout_of, settings_of

from ps_accordion.errors import JoinRefused, RunAborted
from ps_accordion.layout import Tensor
from ps_accordion.wire import framing
from ps_accordion.worker import client, exchange

__all__ = ["Crash", "Faults", "World"]

TABLE = [Tensor("weight", (45, 50), "float32"), Tensor("bias", (9,), "float32"), Tensor("deep", (40, 30), "float32")]
TICK_S = 0.1
BEGIN = 100.0
"""When a run begins: no rule may take the clock's zero for the beginning."""
TIME_LIMIT_S = 900.0
CROWD = 300
"""Messages under way from which on none is doubled. A server here says which view its shard has obeyed, not which it was told:
until a view that it has promised comes, it and the coordinator answer each other at once, and doubles would grow without end."""
RATE = np.float32(0.1)


class Crash(Exception):
    """A process dies here: what it has sent is out, what it has not written is gone."""


@dataclass
class Faults:
    """What goes wrong in a run.

    Attributes:
        drop: Share of the messages that are lost.
        double: Share that comes twice.
        late: Share that takes seconds instead of milliseconds.
        random_faults: How many kills, stalls and cuts are thrown in.
        points: Named points at which a process dies, and how likely.
        crash: A named point at which processes surely die: when it is reached for the first, second, fourth, eighth... time.
        spared: How many of those times pass first.
        stop: From this second on nothing goes wrong any more.
        skip: Share of gradients that are not finite.
        unused: Share of tensors that a worker does not use in a round.
        kinds: What the random faults may be.
        leaves: How many workers are asked to leave in the middle.
        grows: How many workers come in the middle, that nobody has waited for.
    """

    drop: float = 0.0
    double: float = 0.0
    late: float = 0.0
    random_faults: int = 0
    points: dict = field(default_factory=dict)
    crash: str = ""
    spared: int = 0
    stop: float = 60.0
    skip: float = 0.0
    unused: float = 0.0
    kinds: tuple = ("worker", "worker", "server", "coordinator", "stall", "stall", "cut")
    leaves: int = 0
    grows: int = 0

    @classmethod
    def rough(cls):
        """Return faults that leave few seconds in peace, to find planted bugs in few runs."""
        return cls(
            drop=0.05,
            double=0.2,
            late=0.05,
            random_faults=9,
            points={"w.push": 0.01, "w.applied": 0.05, "w.admitted": 0.1, "s.half": 0.01, "s.marked": 0.01, "s.view": 0.1}
            | {"s.frozen": 0.1, "s.sent_some": 0.002, "c.recorded": 0.02, "c.sent_some": 0.002},
            stop=45.0,
            skip=0.05,
            unused=0.1,
        )

    @classmethod
    def of_disks(cls, seed):
        """Return rough faults of which many take a server's disk with it; in every second seed nothing dies at named points."""
        kinds = ("worker", "disk", "disk", "server", "coordinator", "stall", "cut")
        rough = cls.rough()
        return replace(rough, kinds=kinds, random_faults=5 + seed % 6, points=rough.points if seed % 2 else {})

    @classmethod
    def elastic(cls, seed):
        """Return faults, in every second seed rough ones, while workers leave and others come."""
        faults = cls.rough() if seed % 2 else cls(drop=0.05, double=0.2, late=0.02, skip=0.05, unused=0.1, stop=30.0)
        return replace(faults, leaves=1 + seed % 4, grows=seed % 3)

    @classmethod
    def drawn(cls, rng, points=(), kinds=None):
        """Return faults of a random kind and strength."""
        return cls(
            drop=rng.choice([0, 0.02, 0.1, 0.25]),
            double=rng.choice([0, 0.05, 0.3]),
            late=rng.choice([0, 0.02, 0.1]),
            random_faults=rng.randrange(7),
            points=dict.fromkeys(rng.sample(list(points), rng.randint(0, min(3, len(points)))), rng.choice([0.02, 0.1])),
            stop=rng.uniform(15, 70),
            skip=rng.choice([0, 0.02, 0.06]),
            unused=rng.choice([0, 0.15]),
            **({} if kinds is None else {"kinds": kinds}),
        )


class World:
    """One run.

    Args:
        seed: Decides everything.
        faults: What goes wrong; None draws it.
        workers: How many.
        servers: How many, of one shard each.
        rounds: After which round each worker has no more data; None draws it.
        options: Further settings, as `machines.settings_of` takes them.
        roles: Classes of the roles by name, for planted bugs.
    """

    def __init__(self, seed, faults=None, *, workers=3, servers=2, rounds=None, options=None, roles=None, kinds=None):
        from roles import POINTS, ROLES

        self.seed, self.rng = seed, random.Random(seed)
        self.faults = faults if faults is not None else Faults.drawn(self.rng, POINTS, kinds)
        self.roles = ROLES | (roles or {})
        every = {
            "workers_count": workers,
            "workers_maximum": workers + self.faults.grows,
            "servers_count": servers,
            "layout_partition_elements": 1024,
            "servers_state_directory": "simulated",  # what a server that dies leaves is there when it is started again
            "servers_credit": {3: 1000, 4: 1}.get(seed % 5, 4 << 20),  # a few keys, one, all at once
            "codec_light": 0.2,
            "codec_heavy": 0.02,
            "regime_window": "2 steps",
            "regime_interval": 1,
            "codec_residual_at_switch": self.rng.choice(["keep", "keep", "clip"]),
            "seed": seed,
        }
        self.settings = settings_of(**(every | (options or {})))
        self.terms = self.settings.terms()
        self.layout = layout_of(self.settings, TABLE)
        self.finish = rounds or [self.rng.randint(6, 12) for _ in range(workers)]
        self.elastic = random.Random(f"who comes and goes in {seed}")
        """A stream of its own, so that runs in which nobody does stay what they are."""
        self.finish += [self.elastic.randint(6, 12) for _ in range(self.faults.grows)]
        self.now, self.limit = BEGIN, TIME_LIMIT_S
        self.count = Counter()
        self.processes = {}
        self.disks = {}
        """What outlives a process, by role and number."""
        self.snapshots = {}
        """What outlives its disk, too."""
        self.replayed, self.begun_anew = set(), set()
        """(cut, key) of residuals that were made again, and of those that were not."""
        self.differing = []
        """Replays that came to another result than the workers had."""
        self.stalled = {}
        self.cuts = set()
        self.over = ""
        self.pushes, self.applied, self.views, self.results, self.ended = {}, [], {}, {}, set()
        self.workers_ever = []
        self.deciders, self.forgotten = {}, set()
        """Who decided each round; and what was decided by workers that were then out of a view that went back past it."""
        self.holders = []
        self._queue = []
        self._serial = itertools.count()
        self._kills = Counter()
        self._reached = 0
        self._told = 0.0
        """When the last message about sums arrives, of a worker that may have ended."""

    # ------------------------------------------------------------ what roles ask

    def chance(self, *what):
        """Return a number in [0, 1) that follows from the seed and `what`, whenever it is asked."""
        return zlib.crc32(repr((self.seed, *what)).encode()) / 2**32

    def at(self, delay, work, owner=None):
        """Do `work` after a delay, unless its owner has died by then; while the owner is stalled it waits."""
        heapq.heappush(self._queue, (self.now + delay, next(self._serial), work, owner))

    def reach(self, process, name):
        """Die here, if this is the point that the run is about, and its time has come."""
        if not name or name != self.faults.crash:
            return
        self._reached += 1
        times = self._reached.bit_length()  # 1, 2, 4, 8...: the power of two that it may be
        if self._reached == 1 << times - 1 and times > self.faults.spared and self.may_die(process):
            self.count[name] += 1
            raise Crash(name)

    def point(self, process, name, scale=1.0):
        """Die here, if this seed says so."""
        self.reach(process, name)
        deadly = self.now - BEGIN < self.faults.stop and self.rng.random() < self.faults.points.get(name, 0.0) * scale
        if deadly and self._kills["named"] < 10 and self.may_die(process):
            self._kills["named"] += 1
            raise Crash(name)

    def may_die(self, process):
        """Whether somebody is left with the model's state."""
        if process.kind != "worker":
            return True
        return sum(other.has_state for other in self.alive("worker") if other is not process) > 0

    def alive(self, kind):
        """Return the processes of a kind that have not ended."""
        return [process for process in self.processes.values() if process.kind == kind]

    # ------------------------------------------------------------ network

    def send(self, source, target, frames):
        """Carry frames from one process to another, by name; or lose, double or delay them."""
        faults, rng, raging = self.faults, self.rng, self.now - BEGIN < self.faults.stop
        # Bytes as they are now: whoever sends may not change them, but a message outlives its sender here.
        data = [bytes(frame) for frame in frames]
        if raging and ((source, target) in self.cuts or rng.random() < faults.drop):
            self.count["lost"] += 1
            return
        for _ in range(2 if raging and rng.random() < faults.double and len(self._queue) < CROWD else 1):
            late = raging and rng.random() < faults.late
            self.at(rng.uniform(0.5, 12.0) if late else rng.uniform(0.001, 0.02), lambda: self._arrive(source, target, data))

    def tell(self, source, target, message):
        """Carry a message about sums, of which nothing depends but the ledger: none is lost, and chance has no part in it.

        It arrives before what is sent after it, as on one connection.
        """
        frames = [bytes(frame) for frame in framing.pack(message, ())]
        self._told = self.now + 0.0005
        self.at(0.0005, lambda: self._arrive(source, target, frames))

    def _arrive(self, source, target, data):
        process = self.processes.get(target)
        if process is None:
            return
        self._run(process, lambda: process.receive(source, *framing.unpack(data)))

    # ------------------------------------------------------------ processes

    def start(self, kind, number, **fields):
        """Start a process; its name is unique among all that ever were, but for the listeners', which come back to theirs."""
        process = self.roles[kind](self, number, **fields)
        self.processes[process.name] = process
        if kind == "worker":
            self.workers_ever.append(process)
        self.at(self.rng.uniform(0, TICK_S), lambda: self._tick(process), process)

    def _tick(self, process):
        if process.name not in self.stalled:
            self._run(process, process.tick)
        if self.processes.get(process.name) is process:
            self.at(TICK_S, lambda: self._tick(process), process)

    def _run(self, process, work):
        if process.name in self.stalled:
            self.stalled[process.name].append(work)
            return
        try:
            work()
        except Crash:
            self.kill(process)
        except (JoinRefused, RunAborted) as refused:
            # Who comes too late is told so; anything else is for the checks to judge.
            process.end(refused)
            self.processes.pop(process.name, None)
            self.over = self.over or ("" if "ending" in str(refused) or "over" in str(refused) else str(refused))

    def kill(self, process):
        """Let a process die now, and another be started in its place."""
        if self.processes.get(process.name) is not process:
            return
        del self.processes[process.name]
        self.stalled.pop(process.name, None)
        self.count[f"kills of {process.kind}s"] += 1
        for other in self.alive("coordinator"):
            if process.kind != "coordinator":
                self.at(0.01, lambda other=other: self._run(other, lambda: other.lost(process.name)), other)
        delay = self.rng.choice([0.2, 1.0, 1.0, 5.0])
        self.at(delay, lambda: self.start(process.kind, process.number, **process.heritage()))

    def _fault(self):
        rng, kind = self.rng, self.rng.choice(self.faults.kinds)
        everybody = sorted(self.processes)
        if kind in ("worker", "server", "coordinator", "disk"):
            role = "server" if kind == "disk" else kind
            candidates = sorted((process for process in self.alive(role) if self.may_die(process)), key=lambda each: each.name)
            if candidates:
                dies = rng.choice(candidates)
                self.kill(dies)
                if kind == "disk":
                    del self.disks[dies.name]
                    self.count["lost disks"] += 1
        elif kind == "stall":
            name = rng.choice([name for name in everybody if name.startswith("worker")] or everybody)
            self.stalled.setdefault(name, [])
            self.count["stalls"] += 1
            self.at(rng.choice([0.5, 3.0, 14.0, 25.0]), lambda: self._resume(name))
        else:
            pair = tuple(rng.sample(everybody, 2))
            if not any(name.startswith("worker") for name in pair):
                return
            links = {pair, pair[::-1]} if rng.random() < 0.6 else {pair}
            self.cuts |= links
            self.count["cuts"] += 1
            self.at(rng.uniform(1.0, 20.0), lambda: self.cuts.difference_update(links))

    def _resume(self, name):
        for work in self.stalled.pop(name, []):
            process = self.processes.get(name)
            if process is not None:
                self.at(self.rng.uniform(0, 0.01), lambda process=process, work=work: self._run(process, work), process)

    # ------------------------------------------------------------ who comes and goes

    def _leave(self):
        """Ask a worker to leave, if another stays that has the state."""
        training = sorted((each for each in self.alive("worker") if each.has_state), key=lambda each: each.name)
        if len(training) > 1:
            self.elastic.choice(training).leaves = True
            self.count["asked to leave"] += 1

    def _grow(self, number):
        self.count["grown"] += 1
        self.start("worker", number)

    # ------------------------------------------------------------ a run

    def run(self):
        """Run until all workers have ended, and check what happened."""
        clock = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now)
        with contextlib.ExitStack() as patches:
            for module in (client, exchange):
                patches.enter_context(mock.patch.object(module, "time", clock))
            self._run_all()
        from checks import check

        check(self)
        return self.count

    def _run_all(self):
        self.start("coordinator", 0)
        for number in range(self.settings.servers.count):
            self.start("server", number)
        for number in range(self.settings.workers.count):
            self.start("worker", number)
        for _ in range(self.faults.random_faults):
            self.at(self.rng.uniform(1.0, self.faults.stop), self._fault)
        for _ in range(self.faults.leaves):
            self.at(self.elastic.uniform(0.5, 6.0), self._leave)
        for more in range(self.faults.grows):
            self.at(self.elastic.uniform(0.5, 4.0), functools.partial(self._grow, self.settings.workers.count + more))
        while self._queue and (self.alive("worker") or self.now < max(BEGIN + 1.0, self._told)):
            self.now, _, work, owner = heapq.heappop(self._queue)
            if self.now - BEGIN > self.limit:
                raise AssertionError(f"hang: {[process.describe() for process in self.processes.values()]}")
            self.count["events"] += 1
            if owner is None or self.processes.get(owner.name) is owner:
                work()
