"""One step of a job, passed through a simulation of every thread and every link.

    worker   main thread: forward, then backward, a bucket of gradients at a time
             codec thread of the key: encode                    -> sockets -> link
    server   sockets -> shard's thread, when all members' pushes are there: sum and encode again
             -> sockets, once a member                          -> link
    worker   sockets -> codec thread of the key: decode         -> main thread, when all keys are there: optimizer

The sockets of a process are two threads: ours, which costs so much a message, and ZeroMQ's, with the kernel's work for it, which
costs so much a byte.
Rounds are synchronous, and a worker's step begins where the last one ended, so one step from rest is as long as any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .costs import Costs, Handling
from .events import Call, Clock, Cores, Host, Thread, send
from .job import Job, Link, Load

__all__ = ["WAITING", "Step", "simulate"]

WAITING = "waiting"
"""What limits a step in which nothing is busy for half of the time: messages are on their way, or one thing waits for another."""
_BUSY = 0.5


@dataclass(frozen=True)
class Step:
    """What a step comes to.

    Attributes:
        seconds: From its begin to the end of the slowest worker's optimizer.
        compute: Seconds of it that a worker computes, if nothing disturbs it.
        busy: Share of the step in which the busiest of each kind of thing is busy: `computing`, `worker codec`, `worker sockets`,
            `worker link up`, `worker link down`, `server link up`, `server link down`, `server shards`, `server sockets`, and
            `cores` where there are fewer than threads.
        worker_cpu: Processor seconds of a worker beside computing.
        server_cpu: Processor seconds of all servers.
        worker_bytes: Bytes that a worker sends, and as many that it receives.
    """

    seconds: float
    compute: float
    busy: dict[str, float]
    worker_cpu: float
    server_cpu: float
    worker_bytes: float

    @property
    def limit(self) -> str:
        """Name of what is busy for the greatest part of the step: more of that would shorten it."""
        name, share = max(self.busy.items(), key=lambda item: item[1])
        return name if share >= _BUSY else WAITING


def simulate(job: Job, costs: Costs, *, most_workers: int | None = None) -> Step:
    """Let one step pass.

    Args:
        job: The job.
        costs: What its work costs.
        most_workers: Simulate at most so many workers, each of which stands for several: as fast for thousands as for these, and
            within a few per cent. Not where workers and servers share hosts or cores. None simulates all.

    Raises:
        ConfigError: Some costs are not known.
    """
    together = job.colocated or job.shared_cores
    return _Simulation(job, costs, job.workers if together or not most_workers else min(job.workers, most_workers)).run()


class _Process:
    """What workers and servers have alike: sockets on a host."""

    def __init__(self, host: Host, handling: Handling) -> None:
        self.host = host
        self.handling = handling
        self._ours, self._zeromq = Thread(host.cores), Thread(host.cores)

    def send(self, nbytes: float, times: int, then: Call, *args: Any) -> None:
        """Spend what so many messages cost on their way out, then call."""
        _, ours, zeromq = self.handling
        self._ours.submit(times * ours.of(nbytes), self._zeromq.submit, times * zeromq.of(nbytes), then, *args)

    def receive(self, nbytes: float, times: int, then: Call, *args: Any) -> None:
        """Spend what so many messages cost on their way in, then call."""
        _, ours, zeromq = self.handling
        self._zeromq.submit(times * zeromq.of(nbytes), self._ours.submit, times * ours.of(nbytes), then, *args)

    @property
    def busiest(self) -> float:
        """Processor seconds of the busier one of the sockets' threads."""
        return max(self._ours.busy, self._zeromq.busy)

    @property
    def carrying(self) -> float:
        """Processor seconds of both."""
        return self._ours.busy + self._zeromq.busy


class _Worker(_Process):
    def __init__(self, host: Host, handling: Handling, threads: int, stands_for: int) -> None:
        super().__init__(host, handling)
        self.stands_for = stands_for
        self.main = Thread(host.cores)
        self.codecs = [Thread(host.cores) for _ in range(threads)]
        self.left = 0
        """Results that are still to be decoded."""

    @property
    def cpu(self) -> float:
        return self.carrying + sum(thread.busy for thread in self.codecs)


class _Server(_Process):
    def __init__(self, host: Host, handling: Handling, shards: int) -> None:
        super().__init__(host, handling)
        self.shards = [Thread(host.cores) for _ in range(shards)]

    @property
    def cpu(self) -> float:
        return self.carrying + sum(thread.busy for thread in self.shards)


class _Simulation:
    def __init__(self, job: Job, costs: Costs, simulated: int) -> None:
        self._job = job
        self._clock = Clock()
        self._loads = job.loads(costs)
        self._pushed = [0] * len(self._loads)
        """Members whose push of a key is there."""
        self._end = 0.0
        shared = Cores(self._clock, job.shared_cores) if job.shared_cores else None
        # Threads of a worker, and of a server: main, sockets, codecs; sockets, shards.
        here = 3 + job.threads + (2 + job.shards_per_server) * (-(-job.servers // job.workers) if job.colocated else 0)
        hosts = [self._host(job.worker_link, job.worker_cores, here, shared) for _ in range(simulated)]
        stands_for = [job.workers // simulated + (rank < job.workers % simulated) for rank in range(simulated)]
        self._workers = [_Worker(host, costs.worker, job.threads, count) for host, count in zip(hosts, stands_for, strict=True)]
        there = 2 + job.shards_per_server
        self._servers = [
            _Server(
                hosts[number % len(hosts)] if job.colocated else self._host(job.server_link, job.server_cores, there, shared),
                costs.server,
                job.shards_per_server,
            )
            for number in range(job.servers)
        ]

    def _host(self, link: Link, cores: int, threads: int, shared: Cores | None) -> Host:
        own = shared or Cores(self._clock, None if cores >= threads else cores)
        return Host(self._clock, own, rate=link.bytes_per_second, delay=link.delay)

    def run(self) -> Step:
        job, compute = self._job, self._job.compute
        buckets = job.buckets()
        ready: list[list[Load]] = [[] for _ in buckets]
        for load in self._loads:
            ready[load.bucket].append(load)
        for worker in self._workers:
            worker.left = len(self._loads)
            worker.main.submit(compute.forward, _nothing)
            for (_, share), loads in zip(buckets, ready, strict=True):
                worker.main.submit(compute.backward * share, self._encode, worker, loads)
        self._clock.run()
        return self._step()

    def _encode(self, worker: _Worker, loads: list[Load]) -> None:
        for load in loads:
            worker.codecs[load.key % len(worker.codecs)].submit(load.encode, self._push, worker, load)

    def _push(self, worker: _Worker, load: Load) -> None:
        worker.send(load.nbytes, 1, self._send_push, worker, load)

    def _send_push(self, worker: _Worker, load: Load) -> None:
        server = self._servers[load.shard // self._job.shards_per_server]
        send(worker.host, server.host, load.nbytes, load.nbytes * worker.stands_for, self._receive_push, worker, server, load)

    def _receive_push(self, worker: _Worker, server: _Server, load: Load) -> None:
        server.receive(load.nbytes, worker.stands_for, self._hold, worker.stands_for, server, load)

    def _hold(self, members: int, server: _Server, load: Load) -> None:
        self._pushed[load.key] += members
        if self._pushed[load.key] == self._job.workers:
            shard = server.shards[load.shard % self._job.shards_per_server]
            shard.submit(load.answer, self._answer, server, load)

    def _answer(self, server: _Server, load: Load) -> None:
        for worker in self._workers:
            server.send(load.nbytes, worker.stands_for, self._send_result, worker, server, load)

    def _send_result(self, worker: _Worker, server: _Server, load: Load) -> None:
        leaving = load.nbytes * worker.stands_for
        send(server.host, worker.host, leaving, load.nbytes, self._receive_result, worker, load)

    def _receive_result(self, worker: _Worker, load: Load) -> None:
        worker.receive(load.nbytes, 1, self._decode, worker, load)

    def _decode(self, worker: _Worker, load: Load) -> None:
        worker.codecs[load.key % len(worker.codecs)].submit(load.decode, self._decoded, worker)

    def _decoded(self, worker: _Worker) -> None:
        worker.left -= 1
        if not worker.left:
            worker.main.submit(self._job.compute.optimizer, self._finish)

    def _finish(self) -> None:
        self._end = max(self._end, self._clock.now)

    def _step(self) -> Step:
        job, end = self._job, self._end
        workers, servers = self._workers, self._servers
        seconds = {
            "computing": job.compute.total,
            "worker codec": max(thread.busy for worker in workers for thread in worker.codecs),
            "worker sockets": max(worker.busiest for worker in workers),
            "worker link up": max(worker.host.up.busy for worker in workers),
            "worker link down": max(worker.host.down.busy for worker in workers),
            "server link up": max(server.host.up.busy for server in servers),
            "server link down": max(server.host.down.busy for server in servers),
            "server shards": max(thread.busy for server in servers for thread in server.shards),
            "server sockets": max(server.busiest for server in servers),
        }
        hosts = {id(one.host): one.host for one in (*workers, *servers)}.values()
        pools = {id(host.cores): host.cores for host in hosts}.values()
        counted = [pool.busy / pool.count for pool in pools if pool.count is not None]
        seconds |= {"cores": max(counted)} if counted else {}
        return Step(
            seconds=end,
            compute=job.compute.total,
            busy={name: value / end if end else 0.0 for name, value in seconds.items()},
            worker_cpu=max(worker.cpu for worker in workers),
            server_cpu=math.fsum(server.cpu for server in servers),
            worker_bytes=sum(load.nbytes for load in self._loads),
        )


def _nothing() -> None:
    pass
