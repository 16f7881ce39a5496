"""A real run in which processes are killed and stopped all the time, by a seeded schedule, and what must be true of it.

The schedule goes by what the run has written: so many rounds after the last fault comes the next, and a stopped process goes on
when somebody has noticed. Nothing here waits for a time to pass, but for something to be seen, and `PATIENCE` at most.
"""

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import torch
import twins
from replay import Replay

from ps_accordion import config
from ps_accordion.codecs import Coding
from ps_accordion.config import job_of
from ps_accordion.coordinator.log import Log
from ps_accordion.launcher.progress import Tail
from ps_accordion.layout import Tensor
from ps_accordion.selection import lay_out
from ps_accordion.wire.messages import View

__all__ = ["Chaos", "Faults", "replayed"]

SHAPE = (50, 45)
RATE = 0.05
SCRIPT = f"""
import hashlib, os, time
from pathlib import Path
import torch
from torch import nn
from ps_accordion.worker import DistributedModel, connect
torch.set_num_threads(1)
rank, last = int(os.environ["PS_ACCORDION_RANK"]), Path("last")
with connect() as session:
    torch.manual_seed(0)
    model = DistributedModel(nn.Linear({SHAPE[1]}, {SHAPE[0]}), session=session)
    optimizer = torch.optim.SGD(model.parameters(), lr={RATE})
    session.track(optimizer)
    for step in session.steps(1_000_000):
        if last.exists() and step >= int(last.read_text()):
            break
        time.sleep(0.02)  # the work of a step
        draw = torch.Generator().manual_seed(1000 * step + rank)
        optimizer.zero_grad()
        loss = model(torch.randn(4, {SHAPE[1]}, generator=draw)).square().mean()
        if step % 41 == 10 * rank:
            loss = loss * float("nan")
        loss.backward()
        optimizer.step()
    bits = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    print("FINAL", step, hashlib.sha256(bits).hexdigest(), flush=True)
"""
LAUNCHER = """
import sys
from ps_accordion.launcher import outcome
from ps_accordion.launcher.cli import main
outcome.LONGEST_PAUSE_SECONDS = 0.5
sys.exit(main())
"""
"""The launcher, which looks more often than every ten seconds whether what was killed may be started again."""
FLAGS = {
    "run.restarts": 1000,
    "run.record_gradients": True,
    "timeouts.dead": 4,
    "layout.partition_elements": 1024,
    "codec.light": 0.2,
    "codec.heavy": 0.05,
    "regime.window": "5 steps",
    "regime.interval": 1,
}
PATIENCE = 90.0
"""Seconds without anything to be seen that count as a hang: an import on a busy machine takes ten of them."""
LOOK_S = 0.02
"""How often the files are looked at."""
CALM = 20
"""Rounds in peace before the end, so that all have heard where it is; and before a stopped process that nobody misses goes on."""


@dataclasses.dataclass(frozen=True)
class Faults:
    """How many of each."""

    workers: int
    servers: int
    coordinators: int
    stops: int

    def drawn(self, rng):
        """Return them in random order, each with the rounds that pass before it."""
        counts = {"worker": self.workers, "server": self.servers, "coordinator": self.coordinators, "stop": self.stops}
        faults = [kind for kind, count in counts.items() for _ in range(count)]
        rng.shuffle(faults)
        return [(kind, rng.choice([0, 0, 1, 2, 5, 10])) for kind in faults]


class Chaos:
    """One run and whoever disturbs it.

    Args:
        directory: Where; empty.
        workers: How many.
        servers: How many.
        seed: Of the schedule.
    """

    def __init__(self, directory, *, workers, servers, seed):
        self.directory, self.workers, self.servers = directory, workers, servers
        self.rng = random.Random(seed)
        self.run = directory / "run"
        self.done = []
        """What has been done to whom, after which round."""
        self.pids, self.started = {}, {}
        self.rows = {}
        """Of each worker: when it wrote its last line of metrics, and of which round that was."""
        self.stopped = None
        """Who is stopped: name, process, the event that lets it go on, and the newest round when it was."""
        self._tails = {}
        (directory / "train.py").write_text(SCRIPT)

    def play(self, faults):
        """Run, with these faults; return what was printed.

        Raises:
            AssertionError: Nothing has happened for too long, or the run did not end well.
        """
        argv = [sys.executable, "-P", "-c", LAUNCHER, "launch", "--workers", str(self.workers), "--servers", str(self.servers)]
        argv += ["--run-directory", "run", "--progress", "none"]
        argv += [word for name, value in FLAGS.items() for word in ("--set", f"{name}={value}")]
        argv += ["--", sys.executable, "train.py"]
        printed = self.directory / "printed"
        with printed.open("w") as output:
            process = subprocess.Popen(argv, cwd=self.directory, stdout=output, stderr=subprocess.STDOUT)
            try:
                self._play(process, faults)
                process.wait(PATIENCE)
            except BaseException:
                self._release(signal.SIGCONT)
                process.terminate()
                process.wait()
                print(printed.read_text()[-20_000:])
                print("faults so far:", self.done)
                raise
        said = printed.read_text()
        assert process.returncode == 0, said[-20_000:]
        return said

    def _play(self, process, faults):
        self._process = process
        self._until(lambda: len(self._training()) == self.workers, "all train")
        for kind, rounds in faults.drawn(self.rng):
            mark = self.newest
            self._until(lambda mark=mark, rounds=rounds: self.newest >= mark + rounds, f"{rounds} rounds after {mark}")
            if kind == "stop":
                self._until(lambda: self.stopped is None, "the last one that was stopped is noticed")
                self._stop(self.rng.choice(["worker", "worker", "worker", "server", "coordinator"]))
            else:
                self._signal(kind, signal.SIGKILL)
        self._until(lambda: self.stopped is None and len(self._training()) == self.workers, "all train again")
        unfinished = self.directory / "last.new"
        unfinished.write_text(str(self.newest + CALM))
        unfinished.replace(self.directory / "last")
        self._until(lambda: process.poll() is not None, "the end")

    # ------------------------------------------------------------ what is to be seen

    @property
    def newest(self):
        """The newest round that anybody has written about."""
        return max((round_ for _, round_ in self.rows.values()), default=-1)

    def _training(self):
        """Return the workers that live, and have trained in one of the newest rounds."""
        return [
            name
            for name, (when, round_) in self.rows.items()
            if name in self.pids and when > self.started[name] and round_ >= self.newest - 1 and name != (self.stopped or [""])[0]
        ]

    def _until(self, condition, what):
        began = time.monotonic()
        patience = began + PATIENCE
        while True:
            if self._look():
                patience = time.monotonic() + PATIENCE
            if condition():
                return
            assert self._process.poll() is None or what == "the end", f"the run ended while waiting until {what}"
            assert time.monotonic() < patience, f"no round is made, while waiting until {what}"
            assert time.monotonic() - began < 3 * PATIENCE, f"rounds go on, while waiting until {what}"
            time.sleep(LOOK_S)

    def _look(self):
        """Read what is new; return whether a round was."""
        for event in self._new("events-launcher"):
            if event["event"] == "start":
                self.pids[event["name"]], self.started[event["name"]] = event["pid"], event["time"]
            elif event["event"] == "exit":
                self.pids.pop(event["name"], None)
        before = self.newest
        for slot in range(self.workers):
            for row in self._new(f"metrics-worker-{slot}"):
                self.rows[f"worker {slot}"] = row["time"], row["round"]
            for event in self._new(f"events-worker-{slot}"):
                if event["event"] == "silent" and event["name"] == "coordinator":
                    self._notice("coordinator", event)
        for event in self._new("events-coordinator"):
            if event["event"] in ("silent", "gone") and event.get("name") != "coordinator":
                server = f"server {event.get('server')}"
                self._notice(event.get("name") or (f"worker {event['slot']}" if "slot" in event else server), event)
        if self.stopped is not None and self.stopped[0] not in self.pids:
            self.stopped = None  # killed meanwhile
        if self.stopped is not None and self.newest > self.stopped[3] + CALM:
            self._release(signal.SIGCONT)  # nobody misses it
        return self.newest > before

    def _new(self, name):
        tail = self._tails.get(name)
        if tail is None:
            tail = self._tails[name] = Tail(self.run / f"{name}.jsonl")
        return tail.read()

    # ------------------------------------------------------------ faults

    def _signal(self, kind, number, *, allowed=lambda name: True):
        """Send a signal to one of a kind, when there is one that may get it; return its name."""

        def candidates():
            there = [name for name in sorted(self.pids) if name.partition(" ")[0] == kind and allowed(name)]
            # Somebody must be left who has the state: with the last such worker a run ends, as it should.
            return [name for name in there if kind != "worker" or set(self._training()) - {name}]

        self._until(lambda: candidates() and self.pids, f"there is a {kind} that may go")
        name = self.rng.choice(candidates())
        self.done.append((self.newest, name, signal.Signals(number).name))
        os.kill(self.pids[name], number)
        if number == signal.SIGKILL:
            pid = self.pids[name]
            self._until(lambda: self.pids.get(name) != pid, f"the launcher knows of the end of {name}")
        return name

    def _stop(self, kind):
        # A worker that is not in the run has nothing to be missed for.
        allowed = (lambda name: name in self._training()) if kind == "worker" else (lambda name: True)
        name = self._signal(kind, signal.SIGSTOP, allowed=allowed)
        event = "silent" if kind == "coordinator" else self.rng.choice(["silent", "gone"])
        self.stopped = name, self.pids[name], event, self.newest

    def _notice(self, name, event):
        if self.stopped is None:
            return
        stopped, _, awaited, _ = self.stopped
        if name == stopped and event["event"] == awaited:
            self._release(signal.SIGCONT)

    def _release(self, number):
        if self.stopped is not None:
            name, pid, _, _ = self.stopped
            self.stopped = None
            if self.pids.get(name) == pid:
                self.done.append((self.newest, name, signal.Signals(number).name))
                os.kill(pid, number)


# ---------------------------------------------------------------- the replay


def replayed(run, steps):
    """Replay a run from its log of views and the recorded pushes; compare every result and every residual of a shard.

    Args:
        run: The run directory.
        steps: How many rounds were made before the end.

    Returns:
        (sha256 of the parameters after the last round, how many results were compared)
    """
    settings = config.load(run / "config.toml", environment={})
    tensors = [Tensor("weight", SHAPE, "float32"), Tensor("bias", (SHAPE[0],), "float32")]
    layout = lay_out(tensors, settings)
    with Log.open(run / "state", job=job_of(settings)) as log:
        views = [msgspec.convert(record["view"], View) for record in log.records if record["what"] == "view"]
    replay = Replay(layout, settings, {0: {}}, {})
    torch.manual_seed(0)
    model = torch.nn.Linear(SHAPE[1], SHAPE[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    compared = 0
    for round_ in range(steps):
        view = max((view for view in views if view.cut_of(0)[0] <= round_), key=lambda view: view.p)
        pushes = {key.number: [_push(run, round_, key.number, *member) for member in view.members] for key in layout.keys}
        if any(push["kind"] == "SKIP" for of_key in pushes.values() for push in of_key):
            continue  # residuals are as before it, and nobody steps
        gradients = [np.zeros(tensor.elements, np.float32) for tensor in tensors]
        for key in layout.keys:
            coding, payload = _fold(replay, key, round_, pushes[key.number])
            compared += _compare(run, round_, key.number, view, coding, payload)
            mean = twins.decode(coding, payload)
            for part in key.slices:
                gradients[part.tensor][part.start : part.start + part.length] = mean[part.offset : part.offset + part.length]
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = torch.from_numpy(gradient).reshape(parameter.shape)
        optimizer.step()
    for number, residual in replay.server.items():
        server = layout.keys[number].shard // settings.servers.shards_per_server
        stored = np.load(run / "record" / f"server-{server}" / f"residual-0-{number}.npy")
        assert np.array_equal(stored, residual), ("residual of a shard differs from the replay", number)
    bits = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    return hashlib.sha256(bits).hexdigest(), compared


def _push(run, round_, key, slot, incarnation):
    with np.load(run / "record" / f"worker-{slot}" / f"push-0-{round_}-{key}-{incarnation}.npz") as data:
        return {name: data[name] if name == "payload" else data[name].item() for name in data.files}


def _fold(replay, key, round_, pushes):
    kinds = {push["kind"] for push in pushes}
    assert "DATA" in kinds <= {"DATA", "FLUSH", "EMPTY"}, ("kinds of pushes", round_, key.number, kinds)
    data, used = [], 0
    sent = [push for push in pushes if push["codec"]]
    flushed = [at for at, push in enumerate(sent) if push["kind"] == "FLUSH"]
    for push in sent:
        coding = Coding(push["codec"], push["level"], push["elements"], push["count"], push["seed"])
        data.append((push["weight"], coding, push["payload"].tobytes()))
        used |= push["used"]
    return replay._fold(key, round_, data, used, sum(push["weight"] for push in pushes), flushed)


def _compare(run, round_, key, view, coding, payload):
    """Compare a result of the replay with what each worker got that got it under this view; return how many did."""
    found = 0
    for directory in sorted((run / "record").glob("worker-*")):
        file = directory / f"result-0-{round_}-{key}.npz"
        if not file.exists():
            continue
        with np.load(file) as data:
            if data["epoch"] != view.p:
                continue  # taken back by a view, and its worker has not lived to see the other one
            assert (str(data["codec"]), float(data["level"])) == (coding.codec, coding.level), (round_, key, directory.name)
            assert data["payload"].tobytes() == payload, ("result differs from the replay", round_, key, directory.name)
        found += 1
    assert found, ("nobody has this result", round_, key)
    return found


def events(run, name):
    """Return all events of one file."""
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
