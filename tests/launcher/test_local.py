import json
import os
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from ps_accordion import config

SCRIPT = """
import os, signal, sys
import torch
from ps_accordion.worker import connect
with connect() as session:
    tensor = torch.full((2048,), float(session.rank))
    for step in range(int(sys.argv[1])):
        session.push_pull(tensor, name="x")
    print("mean", float(tensor[0]), flush=True)
    if session.rank == 1:
        {ending}
    elif {stays}:
        while True:
            session.push_pull(tensor, name="x")
"""
"""A worker that pushes and pulls, and then does as told: worker 1 ends its own way, worker 0 goes on where `stays` says so."""
SMALL = ("launch", "--workers", "2", "--servers", "1", "--codec", "dense", "--light", "32", "--heavy", "32", "--policy", "static")
RUN = ("--run-directory", "run", "--set", "timeouts.grace=2", "--set", "timeouts.join=60")


@pytest.fixture
def script(tmp_path):
    """Write a training script; return the words that run it."""

    def write(ending="pass", stays=False):
        file = tmp_path / "train.py"
        file.write_text(SCRIPT.format(ending=ending, stays=stays), encoding="utf-8")
        return "--", "python", str(file), "3"

    return write


def test_a_run_averages_over_its_workers_and_leaves_its_records(command, script, tmp_path):
    """Exit code 0, output prefixed, and the run directory holds config, events and metrics, and the trace that was asked for."""
    code, output, error = command(*SMALL, *RUN, "--trace", *script())
    assert code == 0, error
    assert sorted(output.splitlines()) == ["[worker 0] mean 0.5", "[worker 1] mean 0.5"]
    run = tmp_path / "run"
    settings = config.load(run / "config.toml", environment={})
    assert (settings.workers.count, settings.servers.count, settings.codec.name) == (2, 1, "dense")
    assert settings.coordinator.address.startswith("ipc://")
    assert not Path(settings.coordinator.address.removeprefix("ipc://")).parent.exists()
    rows = [json.loads(line) for line in (run / "metrics-worker-0.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["round"] for row in rows] == [0, 1, 2]
    events = [json.loads(line)["event"] for line in (run / "events-coordinator.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "join" in events
    events = [json.loads(line) for line in (run / "events-launcher.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ["coordinator", "server 0", "worker 0", "worker 1"]
    assert [event["name"] for event in events if event["event"] == "start"] == names
    assert {event["name"]: event["code"] for event in events if event["event"] == "exit"} == dict.fromkeys(names, 0)
    drawn = json.loads((run / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    spans = Counter((each["name"], each["args"].get("round")) for each in drawn if each["ph"] == "X")
    assert {stage: [spans[stage, round_] for round_ in range(3)] for stage in ("encode", "fold", "store", "decode")} == {
        "encode": [2, 2, 2], "fold": [1, 1, 1], "store": [1, 1, 1], "decode": [2, 2, 2],
    }  # fmt: skip
    assert Counter(each["name"] for each in drawn if each["ph"] == "f") == {"push": 6, "result": 6}
    assert "trace.json: open it in" in error


@pytest.mark.parametrize(
    ("ending", "code", "last"),
    [
        ("raise RuntimeError('the data is gone')", 1, "RuntimeError: the data is gone"),
        ("sys.exit(3)", 3, ""),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "worker 1 failed: exit code 137, killed by SIGKILL"),
    ],
)
def test_a_failing_worker_ends_the_run_with_its_code(start_command, script, ending, code, last):
    """Whatever ends worker 1 for good, all end within two graces of 2 s (and 8 s for a busy machine), its own error last."""
    alone = ("--set", "run.restarts=0", "--set", "workers.minimum=2")
    process = start_command(*SMALL, *RUN, *alone, *script(ending, stays=True))
    process.line_with("[worker 1] mean")
    start = time.monotonic()
    got, _, error = process.end()
    assert time.monotonic() - start < 12, error
    assert got == code, error
    ending_of_output = error[error.rindex("---- worker 1 failed") :]
    assert last in ending_of_output


def test_run_restarts_starts_a_killed_worker_again(command):
    """From the setting to the variable that the second life sees; what that one ends with is the run's."""
    script = '[ "$PS_ACCORDION_RESTART" ] && exit 30; kill -9 $$'
    place = ("--run-directory", "run", "--set", "run.restarts=1", "--set", "timeouts.grace=1", "--workers", "1", "--servers", "1")
    code, _, error = command("launch", *place, "--", "bash", "-c", script)
    assert code == 30, error
    assert "worker 0 was killed by SIGKILL" in error
    assert "(restart 1 of 1)" in error


def test_workers_that_never_connect_are_a_failure(command):
    """Training alone, side by side, must not pass for a distributed run."""
    code, _, error = command(*SMALL, "--set", "timeouts.grace=1", "--run-directory", "run", "--", "true")
    assert code == 1
    assert "did the command call ps_accordion.worker.connect()" in error


def test_no_process_stays_when_the_launcher_is_killed(start_command, ends_within, tmp_path):
    """SIGKILL of the launcher takes the roles, the workers and their children with it within 2 s, and the sockets too."""
    process = start_command(*SMALL, *RUN, "--", "bash", "-c", "bash -c 'echo child $$; sleep 60; true'; true")
    pids = [int(process.line_with("child").split()[-1]) for _ in range(2)]
    pids += [child.pid for child in psutil.Process(process.popen.pid).children(recursive=True)]
    address = config.load(tmp_path / "run" / "config.toml", environment={}).coordinator.address
    assert len(set(pids)) >= 8  # the guard, the coordinator, a server, two workers with a child and a sleep each
    os.kill(process.popen.pid, signal.SIGKILL)
    deadline = time.monotonic() + 2
    assert [ends_within(pid, max(0.0, deadline - time.monotonic())) for pid in pids] == [True] * len(pids)
    assert not Path(address.removeprefix("ipc://")).parent.exists()


def test_a_coordinators_port_in_use_is_named(command):
    """The message says which address is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        code, _, error = command("coordinator", "--set", f"coordinator.address={address}")
    assert code == 2
    assert address in error
    assert "Traceback" not in error


@pytest.mark.parametrize("role", ["server", "worker"])
def test_a_missing_coordinator_is_reported_after_the_time_allowed(command, script, role):
    """The message says where it looked; the wait is bounded by timeouts.join (1 s; the rest is loading torch)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound but not listening: nobody answers there, and nobody else gets the port
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        settings = ("--set", f"coordinator.address={address}", "--set", "timeouts.join=1")
        start = time.monotonic()
        if role == "server":
            code, _, error = command("server", "--number", "0", *settings)
            assert code == 4
        else:  # a script that does not catch the error ends as any Python program does
            code, _, error = command("worker", "--rank", "0", *settings, *script())
            assert (code, "ps_accordion.errors.Unreachable" in error) == (1, True)
    assert address in error
    assert time.monotonic() - start < 60


def test_listening_beyond_this_machine_needs_insecure(command):
    """Without --insecure, an address that others can reach is refused, with the way out named."""
    code, _, error = command("coordinator", "--set", "coordinator.address=tcp://0.0.0.0:5650")
    assert code == 2
    assert "insecure" in error
