"""`ps-accordion coordinator`, `server` and `worker`: one role in the foreground, for jobs over several machines.

Settings are checked here, and then this process becomes the role, so that signals and exit codes are the role's own.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Annotated, NoReturn

from cyclopts import Parameter

from ps_accordion.errors import ConfigError

from ..local import worker_environment, worker_path
from ..options import JobOptions, role_environment

__all__ = ["coordinator", "server", "worker"]

Insecure = Annotated[bool, Parameter(negative=())]


def coordinator(*, job: JobOptions | None = None, insecure: Insecure = False) -> NoReturn:
    """Run one coordinator in the foreground.

    Args:
        job: The job's settings.
        insecure: Listen beyond this machine, without encryption.
    """
    _become("ps_accordion.coordinator", (), job, insecure)


def server(*, number: int, job: JobOptions | None = None, insecure: Insecure = False) -> NoReturn:
    """Run one server in the foreground.

    Args:
        number: Which server this is, from 0 to servers.count - 1.
        job: The job's settings.
        insecure: Listen beyond this machine, without encryption.
    """
    _become("ps_accordion.server", ("--number", str(number)), job, insecure)


def worker(
    *command: Annotated[str, Parameter(show=False)],
    rank: Annotated[int | None, Parameter(show_default=False)] = None,
    job: JobOptions | None = None,
    local_rank: int = 0,
    local_world_size: int = 1,
) -> NoReturn:
    """Run one worker in the foreground.

    Args:
        command: The training command, after --.
        rank: Which worker this is, from 0 to workers.count - 1, or workers.maximum - 1; without, it takes a place that is free.
        job: The job's settings.
        local_rank: Which of the workers on this machine this is.
        local_world_size: How many workers this machine runs.
    """
    job = job or JobOptions()
    settings = job.settings()
    if not command:
        raise ConfigError("no command to run: put it after --, as in: ps-accordion worker --rank 0 -- python train.py")
    workers = settings.workers
    if rank is not None and not 0 <= rank < workers.places:
        name = "workers.maximum" if workers.maximum else "workers.count"
        raise ConfigError(f"command line: --rank {rank}: expected 0 to {workers.places - 1}, as {name} says")
    program = shutil.which(command[0], path=worker_path())
    if program is None:
        raise ConfigError(f"there is no command {command[0]!r} on the PATH; check its name")
    place = worker_environment(
        -1 if rank is None else rank, workers.count, local_rank=local_rank, local_world_size=local_world_size
    )
    os.execve(program, list(command), role_environment(job) | place)


def _become(module: str, arguments: tuple[str, ...], job: JobOptions | None, insecure: bool) -> NoReturn:
    job = job or JobOptions()
    job.settings()
    environment = role_environment(job)
    if insecure:
        environment["PS_ACCORDION_INSECURE"] = "true"
    argv = [sys.executable, "-P", "-m", module, *arguments]
    os.execve(sys.executable, argv, environment)
