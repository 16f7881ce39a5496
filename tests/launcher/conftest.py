"""Helpers for tests that start the launcher as people do: as a process."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

COMMAND_LINE = (sys.executable, "-P", "-m", "ps_accordion.launcher")
SECONDS = 100
"""More than anything here takes on a busy machine; reached only when something hangs."""

ENGINE = """
import json, os, sys
from pathlib import Path
from ps_accordion.launcher import outcome
from ps_accordion.launcher.child import Guard, Program
from ps_accordion.launcher.screen import Screen
from ps_accordion.launcher.supervisor import supervise
from ps_accordion.telemetry.events import JsonLines
options, commands = json.loads(sys.argv[1]), sys.argv[2:]
if "pause" in options:
    outcome.FIRST_PAUSE_SECONDS = outcome.LONGEST_PAUSE_SECONDS = options.pop("pause")
events = JsonLines(Path(options.pop("events"))) if "events" in options else None
programs = []
for command in commands:
    name, _, script = command.partition("=")
    programs.append(Program(name, name.split()[0], ("/bin/bash", "-c", script), dict(os.environ)))
with Guard() as guard, Screen("none") as screen:
    ending = supervise(programs, screen=screen, guard=guard, events=events, **options)
print("ENDING", ending.exit_code, ending.cause, file=sys.stderr)
sys.exit(ending.exit_code)
"""
"""Supervises shell commands, given as `worker 0=...`, in place of the roles: what is tested is the engine itself."""


class Process:
    """A started process whose output is read as it comes."""

    def __init__(self, argv: tuple[str, ...], **options: object) -> None:
        self.popen = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
        )
        self.output: list[str] = []

    def line_with(self, text: str) -> str:
        """Return the first further line of standard output that holds `text`."""
        for line in self.popen.stdout:
            self.output.append(line)
            if text in line:
                return line.rstrip("\n")
        raise AssertionError(f"the process ended without a line with {text!r}: {self.output} {self.popen.stderr.read()}")

    def error_with(self, text: str) -> str:
        """Return the first further line of standard error that holds `text`."""
        for line in self.popen.stderr:
            if text in line:
                return line.rstrip("\n")
        raise AssertionError(f"the process ended without a line with {text!r} on standard error: {self.output}")

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; return exit code, standard output and standard error."""
        output, error = self.popen.communicate(timeout=SECONDS)
        return self.popen.returncode, "".join(self.output) + output, error

    def kill(self) -> None:
        """End it, should the test not have."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(SECONDS)
        self.popen.stdout.close()
        self.popen.stderr.close()


def seconds_to_end(pid: int, limit: float) -> bool:
    """Return whether process `pid`, not a child of ours, ends within `limit` seconds."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], limit)[0])
    finally:
        os.close(descriptor)


@pytest.fixture
def ends_within() -> Callable[[int, float], bool]:
    """Wait for the end of any process, up to a limit."""
    return seconds_to_end


@pytest.fixture
def engine() -> Iterator[Callable[..., Process]]:
    """Start the local engine over shell commands: `engine("worker 0=exit 3", grace=2)`.

    Options are those of `supervise`, `pause` before every restart in seconds, and `events`, a file for them.
    """
    started = []

    def start(*commands: str, grace: float = 5, **options: object) -> Process:
        text = json.dumps({"grace": grace, **options}, default=str)
        started.append(Process((sys.executable, "-P", "-c", ENGINE, text, *commands)))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def start_command(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start `ps-accordion` with these arguments, in an empty directory."""
    started = []

    def start(*arguments: str, **variables: str) -> Process:
        started.append(Process((*COMMAND_LINE, *arguments), cwd=tmp_path, env=os.environ | variables))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def command(start_command: Callable[..., Process]) -> Callable[..., tuple[int, str, str]]:
    """Run `ps-accordion` with these arguments; return exit code, standard output and standard error."""
    return lambda *arguments, **variables: start_command(*arguments, **variables).end()
