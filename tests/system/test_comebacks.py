"""Workers that die, freeze or are stuck, as a user meets it: through the command line, with real processes.

The others go on; who comes back takes over all that they have learned; in the end all hold the same bits.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
import hashlib, os, signal, sys, time, torch
from pathlib import Path
from torch import nn
from ps_accordion.worker import DistributedModel, connect
torch.set_num_threads(1)
rank, life, steps = int(os.environ["PS_ACCORDION_RANK"]), int(os.environ.get("PS_ACCORDION_RESTART", 0)), 120
with connect() as session:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
    model = DistributedModel(model, session=session)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 40, 0.5)
    session.track(optimizer, scheduler=scheduler)
    if life:
        Path("back").touch()
    for step in session.steps(steps):
        FAULT
        draw = torch.Generator().manual_seed(1000 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(8, 64, generator=draw)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    momenta = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    state = b"".join(t.numpy().tobytes() for t in [*model.state_dict().values(), *momenta])
    print("STATE", hashlib.sha1(state).hexdigest(), optimizer.param_groups[0]["lr"], step)
"""


WAIT_FOR_THE_RESTARTED = """
if rank == 2 and step == 60:
    with session.busy("waiting"):
        while not Path("back").exists():
            time.sleep(0.05)
time.sleep(0.05 if step >= 60 else 0)
"""


def launch(tmp_path, fault, *flags, workers=3):
    """Run the script; return (exit code, states of the workers as they end, everything printed)."""
    (tmp_path / "train.py").write_text(SCRIPT.replace("FAULT", textwrap.indent(textwrap.dedent(fault).strip(), " " * 8).strip()))
    argv = [sys.executable, "-P", "-m", "ps_accordion.launcher", "launch", "--workers", str(workers), "--servers", "2"]
    argv += ["--run-directory", str(tmp_path / "run"), "--progress", "none", "--set", "codec.light=0.1", *flags]
    argv += ["--", sys.executable, "train.py"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=100, env=os.environ, check=False)
    states = [line.partition("STATE ")[2] for line in done.stdout.splitlines() if "STATE" in line]
    return done.returncode, states, done.stdout + done.stderr


def views(tmp_path):
    """Return who was taken out and who came in, view by view."""
    events = [json.loads(line) for line in (tmp_path / "run" / "events-coordinator.jsonl").read_text().splitlines()]
    return [(event["removed"], event["new"]) for event in events if event["event"] == "view" and event["p"] > 1]


LOW_RANK = ("--set", "codec.name=powersgd", "--set", "codec.light=4")
"""Whoever comes back must get what the others' codecs go on from."""
KILLED = [(0, ()), *(pytest.param(who, flags, marks=pytest.mark.full) for who, flags in ((1, ()), (1, LOW_RANK)))]


@pytest.mark.parametrize(("who", "flags"), KILLED)
def test_a_killed_worker_is_started_again_and_catches_up(tmp_path, who, flags):
    """Also the one whose parameters all began with: parameters, batch-norm, momentum, rate and step are those of the others."""
    fault = f"if (rank, life, step) == ({who}, 0, 20):\n    os.kill(os.getpid(), signal.SIGKILL)\n" + WAIT_FOR_THE_RESTARTED
    code, states, said = launch(tmp_path, fault, "--set", "run.restarts=3", *flags)
    assert code == 0, said
    assert len(states) == 3
    assert len(set(states)) == 1, said
    assert states[0].endswith(" 119")
    assert views(tmp_path) == [([who], []), ([], [who])]


@pytest.mark.full
def test_a_worker_that_is_started_again_too_late_is_no_failure(tmp_path):
    """The others have finished: it says so, and ends well, because nothing is left to do."""
    fault = "if (rank, life, step) == (1, 0, 118):\n    os.kill(os.getpid(), signal.SIGKILL)"
    code, states, said = launch(tmp_path, fault, "--set", "run.restarts=3")
    assert code == 0, said
    assert len(states) == 2
    assert len(set(states)) == 1
    assert "started again too late" in said


@pytest.mark.full
def test_a_killed_worker_that_nobody_starts_again_is_done_without(tmp_path):
    """The others go on to the end; the launcher still says that one was killed."""
    fault = "if (rank, step) == (2, 20):\n    os.kill(os.getpid(), signal.SIGKILL)"
    code, states, said = launch(tmp_path, fault, "--set", "run.restarts=0", "--set", "timeouts.grace=20")
    assert code == 128 + 9, said
    assert len(states) == 2
    assert len(set(states)) == 1
    assert views(tmp_path) == [([2], [])]


def test_a_frozen_worker_comes_back_when_it_thaws(tmp_path):
    """Stopped for longer than `timeouts.dead`: it keeps its residual, loses its step, and takes over the state."""
    fault = """
    pid = Path("pid")
    if (rank, step) == (1, 20) and not pid.exists():
        pid.with_suffix(".new").write_text(str(os.getpid()))
        pid.with_suffix(".new").rename(pid)
        os.kill(os.getpid(), signal.SIGSTOP)
    if (rank, step) == (0, 50):
        os.kill(int(pid.read_text()), signal.SIGCONT)
    time.sleep(0.02 if step < 50 else 0.05)
    """
    code, states, said = launch(tmp_path, fault, "--set", "timeouts.dead=4")
    assert code == 0, said
    assert len(states) == 3
    assert len(set(states)) == 1, said
    assert views(tmp_path) == [([1], []), ([], [1])]
    assert "with the state of the others" in said


@pytest.mark.full
def test_a_worker_that_is_stuck_is_done_without(tmp_path):
    """Its threads answer, but its script waits for something that never comes before the others have moved on."""
    fault = """
    if (rank, step) == (1, 20):
        while not Path("go").exists():
            time.sleep(0.05)
    if (rank, step) == (0, 50):
        Path("go").touch()
    time.sleep(0.02 if step < 50 else 0.05)
    """
    code, states, said = launch(tmp_path, fault, "--set", "timeouts.stuck=2")
    assert code == 0, said
    assert len(set(states)) == 1, said
    assert views(tmp_path) == [([1], []), ([], [1])]


@pytest.mark.full
def test_who_is_busy_is_waited_for(tmp_path):
    """Several times as long as who says nothing."""
    fault = "if (rank, step) == (1, 20):\n    with session.busy('evaluation'):\n        time.sleep(8)"
    code, states, said = launch(tmp_path, fault, "--set", "timeouts.stuck=2", workers=2)
    assert code == 0, said
    assert len(set(states)) == 1
    assert views(tmp_path) == []
