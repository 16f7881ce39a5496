"""Workers that leave in peace, and others that come, as a user meets it: through the command line, with real processes.

Nothing is lost, nobody waits for more than a view, and every result is that of a replay in numpy, with what was handed over.
"""

import json
import re
import subprocess
import sys
import textwrap

import pytest
from chaos import RATE, SHAPE, events, replayed

STEPS = 60
SCRIPT = f"""
import hashlib, os, signal, sys, torch
from pathlib import Path
from torch import nn
from ps_accordion.worker import DistributedModel, connect
torch.set_num_threads(1)
with connect() as session:
    torch.manual_seed(0)
    model = DistributedModel(nn.Linear({SHAPE[1]}, {SHAPE[0]}), session=session)
    optimizer = torch.optim.SGD(model.parameters(), lr={RATE})
    session.track(optimizer)
    rank = session.rank
    for step in session.steps({STEPS}):
        draw = torch.Generator().manual_seed(1000 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(4, {SHAPE[1]}, generator=draw)).square().mean().backward()
        optimizer.step()
        EVENT
    bits = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    print("FINAL", step, len(session.members), hashlib.sha256(bits).hexdigest(), flush=True)
"""
FLAGS = {
    "run.record_gradients": True,
    "layout.partition_elements": 1024,
    "codec.light": 0.01,
    "codec.heavy": 0.01,
    "regime.policy": "static",
}


def launch(directory, event, *, workers=3, **flags):
    """Start a run whose workers do `event` after each step."""
    (directory / "train.py").write_text(SCRIPT.replace("EVENT", textwrap.indent(textwrap.dedent(event).strip(), " " * 8).strip()))
    argv = [sys.executable, "-P", "-m", "ps_accordion.launcher", "launch", "--workers", str(workers), "--servers", "2"]
    argv += ["--run-directory", "run", "--progress", "line"]
    argv += [word for name, value in (FLAGS | flags).items() for word in ("--set", f"{name}={value}")]
    argv += ["--", sys.executable, "train.py"]
    return subprocess.Popen(argv, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def come(directory, *words):
    """Start one more worker by hand, as a user does beside a run."""
    argv = [sys.executable, "-P", "-m", "ps_accordion.launcher", "worker", "--config", "run/config.toml", *words]
    return subprocess.Popen(
        [*argv, "--", sys.executable, "train.py"], cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def said_by(*processes):
    """Wait for the ends of processes; return what they printed."""
    said = []
    for process in processes:
        try:
            said.append(process.communicate(timeout=100)[0])
        finally:
            process.kill()
        assert process.returncode == 0, said[-1]
    return said


def check(directory, finals, *, workers):
    """Replicas are equal to the replay; the ledger has compared all, and has no item. Return the members of all views."""
    (steps, left, digest) = finals.pop()
    assert not finals, finals
    assert (int(steps), int(left)) == (STEPS - 1, workers)
    replay, compared = replayed(directory / "run", STEPS)
    assert replay == digest
    assert compared > STEPS
    told = events(directory / "run", "events-coordinator")
    (ledger,) = [event for event in told if event["event"] == "ledger"]
    assert (ledger["balanced"], ledger["lost"], ledger["open"]) == (True, [], []), ledger["text"]
    assert ledger["workers"]["lost"] == ledger["servers"]["lost"] == 0
    assert not [event for event in told if event["event"] in ("gone", "lost")]
    return [[slot for slot, _ in event["members"]] for event in told if event["event"] == "view"]


@pytest.mark.timeout(120)
def test_a_worker_that_gets_sigterm_hands_over_all_that_it_has_left_out(tmp_path):
    """It ends with 0 after its step, and is not started again; topk at 1 % leaves most of every gradient for later."""
    event = "if rank == 1 and step == 20: os.kill(os.getpid(), signal.SIGTERM)"
    (said,) = said_by(launch(tmp_path, event))
    assert "[worker 1] ps-accordion: this worker has left the run, and the others go on" in said
    assert check(tmp_path, set(re.findall(r"FINAL (\d+) (\d+) (\w+)", said)), workers=2) == [[0, 1, 2], [0, 2]]
    flushes = [json.loads(line) for line in (tmp_path / "run" / "events-worker-1.jsonl").read_text().splitlines()]
    assert [event["flushed"] for event in flushes if event["event"] == "left"] == [[[0, 21]]]
    assert not [event for event in events(tmp_path / "run", "events-launcher") if event["event"] == "restart"]


UNTIL_THREE = """
if step == 20:
    with session.busy("waiting"):
        session.client.wait(lambda: len(session.members) == 3, "a third worker")
if rank == 2 and step == 40:
    session.leave()
"""


@pytest.mark.full
@pytest.mark.timeout(120)
def test_a_worker_that_nobody_waited_for_counts_until_it_leaves(tmp_path):
    """`workers.maximum` has room for one more: it is started by hand, takes over the state, and weighs as much as the others."""
    run = launch(tmp_path, UNTIL_THREE, workers=2, **{"workers.maximum": 3})
    while not (tmp_path / "run" / "metrics-worker-1.jsonl").exists():
        assert run.poll() is None, run.communicate()[0]
    said, joined = said_by(run, come(tmp_path))
    assert "this worker came into the run at round" in joined
    finals = set(re.findall(r"FINAL (\d+) (\d+) (\w+)", said))
    assert check(tmp_path, finals, workers=2) == [[0, 1], [0, 1, 2], [0, 1]]


@pytest.mark.full
@pytest.mark.timeout(120)
def test_below_the_minimum_the_run_waits_says_so_and_goes_on(tmp_path):
    """Until another worker comes; nothing is lost by that, either."""
    run = launch(tmp_path, "if rank == 1 and step == 20: session.leave()", workers=2, **{"workers.minimum": 2})
    told = tmp_path / "run" / "events-coordinator.jsonl"
    while not (told.exists() and '"waiting", "missing": "worker 1 (workers.minimum is 2)"' in told.read_text()):
        assert run.poll() is None, run.communicate()[0]
    said, _ = said_by(run, come(tmp_path, "--rank", "1"))
    assert "[coordinator] coordinator: waiting for worker 1 (workers.minimum is 2), 0 s so far" in said
    assert "[coordinator] coordinator: the rounds go on, after" in said
    finals = {final for final in re.findall(r"FINAL (\d+) (\d+) (\w+)", said) if final[0] == str(STEPS - 1)}
    assert check(tmp_path, finals, workers=2) == [[0, 1], [0, 1]]
