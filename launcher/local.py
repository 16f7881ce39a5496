"""The local engine: a whole run on this machine, over sockets that only this user can reach."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ps_accordion import checkpoint, config
from ps_accordion.compression import CodecSettings
from ps_accordion.config import CoordinatorSettings, ServerSettings, Settings
from ps_accordion.errors import ConfigError, StorageError
from ps_accordion.role import CONFIG_VARIABLE
from ps_accordion.sources import ENVIRONMENT_PREFIX
from ps_accordion.telemetry import trace
from ps_accordion.telemetry.events import JsonLines

from .child import Guard, Program
from .options import plain_environment
from .progress import Progress, Tail
from .screen import Screen
from .supervisor import Ending, supervise

__all__ = ["Link", "new_run_directory", "run", "worker_environment", "worker_path"]

Link = Literal["ipc", "tcp"]
"""What carries gradients between the processes of one machine."""

MAX_SOCKET_DIRECTORY = 80
"""A Unix socket's path holds at most 107 bytes; the socket's own name needs the rest."""


def run(settings: Settings, command: Sequence[str], *, screen: Screen, link: Link = "ipc") -> Ending:
    """Run a job on this machine: a coordinator, servers, and `command` once a worker.

    Args:
        settings: The job. An empty run directory becomes a new one under `runs/`. Addresses left at their defaults become
            Unix sockets in a private directory, which is removed at the end.
        command: Program and arguments of every worker; no shell sees them.
        screen: Where output goes.
        link: `tcp` leaves the servers' default address, TCP on loopback, as it is.

    Raises:
        ConfigError: The command is empty or does not exist, or the run directory holds another run.
    """
    program = _resolve(command)
    with Guard() as guard, _sockets(guard) as sockets:
        settings = _placed(settings, sockets, link)
        directory = _prepare(settings)
        screen.say(
            f"{settings.workers.count} workers, {settings.servers.count} servers, codec {_codecs(settings.codec)}, "
            f"policy {settings.regime.policy}; run directory {_shown(directory)}"
        )
        with contextlib.closing(JsonLines.of_role(str(directory), "events", "launcher")) as events:
            ending = supervise(
                _programs(settings, directory / "config.toml", (program, *command[1:])),
                screen=screen,
                guard=guard,
                grace=settings.timeouts.grace,
                restarts=settings.run.restarts,
                minimum=settings.workers.minimum,
                joined=lambda: _joined(directory),
                events=events,
                progress=_progress(directory).update,
                accused=lambda: _accused(directory),
            )
        if settings.run.trace:
            _draw(directory, screen)
        checkpoints = Path(settings.checkpoint_directory)
        if ending.exit_code and checkpoint.complete(checkpoints):
            screen.say(f"to go on from the last checkpoint: ps-accordion launch --resume {_shown(checkpoints)} ...")
        return ending


def new_run_directory() -> Path:
    """Return `runs/<date>-<time>-<id>` under the current directory; it is not made."""
    return Path.cwd() / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def worker_path() -> str:
    """Return the PATH of workers: our interpreter's directory comes first, so that `python` is the one that has us."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def worker_environment(rank: int, world_size: int, *, local_rank: int, local_world_size: int) -> dict[str, str]:
    """Return what a worker's environment holds beyond the plain one: where it stands in the run; any place for a rank of -1."""
    place = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_world_size,
    }
    environment = {ENVIRONMENT_PREFIX + name: str(value) for name, value in place.items() if value >= 0}
    environment["PATH"] = worker_path()
    environment["PYTHONUNBUFFERED"] = "1"
    # As torchrun does: workers that share a machine would otherwise each start a thread a core.
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return environment


def _draw(directory: Path, screen: Screen) -> None:
    file = directory / "trace.json"
    try:
        spans = trace.merge([directory], file)
    except StorageError as error:  # the run has its own outcome
        screen.say(str(error))
    else:
        screen.say(f"{spans} spans in {_shown(file)}: open it in chrome://tracing or ui.perfetto.dev")


def _codecs(settings: CodecSettings) -> str:
    """Return the codec of a run in words, with those of single tensors."""
    others = [f"{row.codec} for {row.pattern}" for row in settings.tensors.rows]
    return f"{settings.name} ({', '.join(others)})" if others else settings.name


def _resolve(command: Sequence[str]) -> str:
    if not command:
        raise ConfigError("no command to run: put the training command after --, as in: ps-accordion launch -- python train.py")
    found = shutil.which(command[0], path=worker_path())
    if found is None:
        raise ConfigError(f"there is no command {command[0]!r} on the PATH or in {Path.cwd()}; check its name")
    return found


@contextlib.contextmanager
def _sockets(guard: Guard) -> Iterator[Path]:
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > MAX_SOCKET_DIRECTORY:
        parent = "/tmp"
    directory = Path(tempfile.mkdtemp(prefix="psa-", dir=parent))  # mode 0700
    guard.remove_at_end(directory)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _placed(settings: Settings, sockets: Path, link: Link) -> Settings:
    values = {}
    if settings.coordinator.address == CoordinatorSettings().address:
        values["coordinator.address"] = f"ipc://{sockets}/c"
    if link == "ipc" and settings.servers.bind == ServerSettings().bind:
        values["servers.bind"] = f"ipc://{sockets}/s{{number}}"
    directory = Path(settings.run.directory) if settings.run.directory else new_run_directory()
    values["run.directory"] = str(directory.absolute())
    if settings.checkpoint.directory:
        values["checkpoint.directory"] = str(Path(settings.checkpoint.directory).absolute())
    if settings.checkpoint.resume:
        values["checkpoint.resume"] = str(Path(settings.checkpoint.resume).absolute())
    return settings.replaced(values, source="the launcher")


def _prepare(settings: Settings) -> Path:
    directory = Path(settings.run.directory)
    file = directory / "config.toml"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:
            stream.write(config.render(settings))
    except FileExistsError:
        raise ConfigError(f"run directory {str(directory)!r} holds another run already; name a new one, or remove it") from None
    except OSError as error:
        raise ConfigError(f"run directory {str(directory)!r} cannot be written: {error.strerror}; name another") from None
    return directory


def _programs(settings: Settings, file: Path, command: tuple[str, ...]) -> list[Program]:
    environment = plain_environment() | {CONFIG_VARIABLE: str(file)}
    role = (sys.executable, "-P", "-m")
    programs = [Program("coordinator", "coordinator", (*role, "ps_accordion.coordinator"), environment)]
    for number in range(settings.servers.count):
        argv = (*role, "ps_accordion.server", "--number", str(number))
        programs.append(Program(f"server {number}", "server", argv, environment))
    workers = settings.workers.count
    for rank in range(workers):
        place = worker_environment(rank, workers, local_rank=rank, local_world_size=workers)
        programs.append(Program(f"worker {rank}", "worker", command, environment | place))
    return programs


def _progress(directory: Path) -> Progress:
    return Progress(*(directory / f"{name}.jsonl" for name in ("metrics-worker-0", "events-coordinator", "events-worker-0")))


def _joined(directory: Path) -> bool:
    """Return whether all workers had joined: then the coordinator has made a view."""
    return any(event["event"] == "view" for event in Tail(directory / "events-coordinator.jsonl").read())


def _accused(directory: Path) -> tuple[str, float] | None:
    for event in Tail(directory / "events-coordinator.jsonl").read():
        if event["event"] == "error":
            return event["culprit"], event["monotonic"]
    return None


def _shown(directory: Path) -> Path:
    """Return the path as people type it: relative where it is below the current directory."""
    with contextlib.suppress(ValueError):
        return directory.relative_to(Path.cwd())
    return directory
