"""Jobs on hosts: the processes of one way of training, each on its host, ours or what it is compared with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, Self

from benchmarks import hosts
from ps_accordion import config

__all__ = ["Job", "Place", "Processes", "start"]

PORT = 5650


class Job(NamedTuple):
    """One way of training.

    Attributes:
        name: In tables and files: `ddp`, or `topk:0.01`.
        way: One of `training.WAYS`.
        codec: For ours.
        level: For ours: the light one.
        heavy: For ours: the level outside of critical regimes, as Accordion decides; 0 where the level is fixed.
    """

    name: str
    way: str
    codec: str = ""
    level: float = 0.0
    heavy: float = 0.0


class Place(NamedTuple):
    """Where processes run."""

    workers: list[hosts.Host]
    servers: list[hosts.Host]


class Processes:
    """Processes whose output goes to one file; they are ended on the way out of the `with` block.

    Args:
        log: The file.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            process.terminate()
        for process in self._running:
            process.wait()

    def run(self, host: hosts.Host, *command: str, **environment: str) -> None:
        """Start one."""
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        with self._log.open("ab") as output:
            self._running.append(subprocess.Popen(host.runs(*command), env=variables, stdout=output, stderr=output))

    def alive(self) -> bool:
        """Whether all still live."""
        return all(process.poll() is None for process in self._running)

    def wait(self, seconds: float) -> None:
        """Wait until all have ended.

        Raises:
            subprocess.TimeoutExpired: One takes longer.
        """
        for process in self._running:
            process.wait(timeout=seconds)

    def codes(self) -> list[int | None]:
        """Return their exit codes; None of those that live."""
        return [process.poll() for process in self._running]

    def said(self) -> str:
        """Return the end of what they have printed."""
        return self._log.read_text(errors="replace")[-4000:] if self._log.exists() else ""


def start(job: Job, place: Place, directory: Path, training: list[str], processes: Processes) -> None:
    """Start the processes of a job.

    Args:
        job: What.
        place: Where.
        directory: For the files that it needs, and those that it leaves.
        training: Command of a worker.
        processes: Receives them.
    """
    if job.way == "ours":
        _start_ours(job, place, directory, training, processes)
        return
    for rank, host in enumerate(place.workers):
        group = {"MASTER_ADDR": place.workers[0].address, "MASTER_PORT": str(PORT + _number(job))}
        group |= {"RANK": str(rank), "WORLD_SIZE": str(len(place.workers)), "GLOO_SOCKET_IFNAME": hosts.INTERFACE}
        processes.run(host, *training, **group)


def _start_ours(job: Job, place: Place, directory: Path, training: list[str], processes: Processes) -> None:
    file = directory / f"{job.name}.toml"
    settings = config.load(
        overrides={
            "workers.count": len(place.workers),
            "servers.count": len(place.servers),
            "codec.name": job.codec,
            "codec.light": job.level,
            "codec.heavy": job.heavy or job.level,
            "regime.policy": "accordion" if job.heavy else "static",
            "coordinator.address": f"tcp://{place.servers[0].address}:{PORT + _number(job)}",
            "servers.state_directory": str(directory / f"{job.name}-state"),
        }
    )
    file.write_text(config.render(settings), encoding="utf-8")
    program = [sys.executable, "-m", "ps_accordion.launcher"]
    given = ["--config", str(file)]
    processes.run(place.servers[0], *program, "coordinator", *given, "--insecure")
    for number, host in enumerate(place.servers):
        bind = ["--set", f"servers.bind=tcp://{host.address}:*"]
        processes.run(host, *program, "server", "--number", str(number), *given, "--insecure", *bind)
    for rank, host in enumerate(place.workers):
        processes.run(host, *program, "worker", "--rank", str(rank), *given, "--", *training)


def _number(job: Job) -> int:
    return sum(job.name.encode())  # a port of its own, on hosts that are ours alone
