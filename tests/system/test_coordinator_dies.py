"""The coordinator is killed and started again: no round waits for it, and nothing that it has said is lost."""

import itertools
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.full

SCRIPT = """
import hashlib, json, os, pathlib, signal, time
import torch
from torch import nn
from ps_accordion.worker import DistributedModel, connect

STEPS, RUN = 80, pathlib.Path("run")
torch.set_num_threads(1)
rank = int(os.environ["PS_ACCORDION_RANK"])
first_life = "PS_ACCORDION_RESTART" not in os.environ

def events(role):
    lines = (RUN / f"events-{role}.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\\n")]

def until(condition):
    with session.busy("waiting"):
        while not condition():
            session._client.notice(0.05)
            assert session._client.error is None, session._client.error

with connect() as session:
    torch.manual_seed(0)
    model = DistributedModel(nn.Linear(64, 32), session=session)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    session.track(optimizer)
    for step in session.steps(STEPS):
        meanwhile(step)
        chance = torch.Generator().manual_seed(1000 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(4, 64, generator=chance)).square().mean().backward()
        optimizer.step()
    final = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
print("FINAL", rank, final, flush=True)
"""
SECONDS = 100
"""More than any of these takes on a busy machine."""


def launch(directory, meanwhile, *flags, launcher=("-m", "ps_accordion.launcher"), steps=80, seconds=SECONDS, **environment):
    """Train two workers that call `meanwhile(step)` before each step; return (exit code, final hashes, all that was printed)."""
    directory.mkdir(exist_ok=True)
    head, tail = SCRIPT.split("with connect()", 1)
    head = head.replace("STEPS, RUN = 80", f"STEPS, RUN = {steps}")
    (directory / "train.py").write_text(f"{head}{textwrap.dedent(meanwhile)}\nwith connect(){tail}")
    argv = [sys.executable, "-P", *launcher, "launch", "--workers", "2", "--servers", "2"]
    argv += ["--run-directory", "run", "--progress", "none", "--set", "run.restarts=3", "--set", "timeouts.dead=3"]
    argv += [*flags, "--", sys.executable, "train.py"]
    done = subprocess.run(
        argv,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=seconds,
        env=os.environ | environment,
        check=False,
    )
    said = done.stdout + done.stderr
    return done.returncode, dict(re.findall(r"FINAL (\d) (\w+)", said)), said


def events(directory, role, event):
    """Return the events of one kind of one role."""
    lines = (directory / "run" / f"events-{role}.jsonl").read_text().splitlines()
    return [each for line in lines if (each := json.loads(line))["event"] == event]


KILLS_IT = """
def meanwhile(step):
    if rank == 0 and step == 20:
        [pid] = [event["pid"] for event in events("launcher") if event["event"] == "start" and event["name"] == "coordinator"]
        os.kill(pid, signal.SIGKILL)
    if rank == 0 and step == 60:
        until(lambda: sum(event["event"] == "start" for event in events("coordinator")) == 2)
"""


def test_rounds_go_on_without_a_coordinator_and_end_with_the_same_bits(tmp_path):
    """It is killed while they train: rounds are decided until it is back, none is skipped, and no view is made."""
    code, undisturbed, said = launch(tmp_path / "a", "def meanwhile(step): pass", "--policy", "static")
    assert code == 0, said
    code, finals, said = launch(tmp_path / "b", KILLS_IT, "--policy", "static")
    assert code == 0, said
    assert finals == undisturbed
    assert len(set(finals.values())) == 1
    assert len(finals) == 2
    starts = events(tmp_path / "b", "coordinator", "start")
    assert [(start["term"], start["view"]) for start in starts] == [(1, -1), (2, 1)]
    assert len(events(tmp_path / "b", "coordinator", "view")) == 1
    [death] = [event["time"] for event in events(tmp_path / "b", "launcher", "exit") if event["name"] == "coordinator"][:1]
    for server in range(2):
        rounds = events(tmp_path / "b", f"server-{server}", "round")
        assert [event["kind"] for event in rounds] in ([], ["DATA"] * 80 + ["END"])
    held = [event for server in range(2) for event in events(tmp_path / "b", f"server-{server}", "round")]
    assert [event for event in held if death < event["time"] < starts[1]["time"]]


DOWN_FOR = 60.0
"""Seconds between the death of a coordinator and the start of the next."""
STAYS_AWAY = """
import sys
from ps_accordion.launcher import outcome
from ps_accordion.launcher.cli import main
outcome.FIRST_PAUSE_SECONDS = outcome.LONGEST_PAUSE_SECONDS = float(sys.argv.pop(1))
sys.exit(main())
"""
KILLS_IT_FOR_LONG = """
def meanwhile(step):
    time.sleep(0.03)
    if rank == 0 and step == 20:
        [pid] = [event["pid"] for event in events("launcher") if event["event"] == "start" and event["name"] == "coordinator"]
        os.kill(pid, signal.SIGKILL)
"""


@pytest.mark.timeout(300)
def test_no_round_is_lost_while_the_coordinator_is_away_for_a_minute(tmp_path):
    """Rounds are decided all the time under the plan that was there, none is skipped, and then there are plans again."""
    flags = (
        "--policy",
        "accordion",
        "--set",
        "regime.window=5 steps",
        "--set",
        "regime.interval=1",
        "--set",
        "timeouts.lost=120",
    )
    away = ("-c", STAYS_AWAY, str(DOWN_FOR))
    code, finals, said = launch(tmp_path, KILLS_IT_FOR_LONG, *flags, launcher=away, steps=2500, seconds=250)
    assert code == 0, said
    assert len(finals) == 2, said
    assert len(set(finals.values())) == 1, said
    first, second = events(tmp_path, "coordinator", "start")
    [death] = [event["time"] for event in events(tmp_path, "launcher", "exit") if event["name"] == "coordinator"][:1]
    assert second["time"] - death >= DOWN_FOR
    assert (first["term"], second["term"]) == (1, 2)
    assert len(events(tmp_path, "coordinator", "view")) == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics-worker-0.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(2500))
    assert {row["kind"] for row in rows} == {"DATA"}
    away = [row for row in rows if death < row["time"] < second["time"]]
    assert max(after["time"] - before["time"] for before, after in itertools.pairwise(away)) < 10
    assert away[0]["time"] - death < 10
    # The last plan holds, as long as it has not expired. One may be on its way when the coordinator dies: it goes with a result
    # of the rounds after, and is in force in the next.
    [last] = {row["plan"] for row in away[5:]}
    assert last > 0
    assert rows[-1]["plan"] > last  # and the next coordinator makes others


A_WORKER_DIES = """
def meanwhile(step):
    if rank == 1 and step == 20 and first_life:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0 and step == 40:
        until(lambda: len(session._client.membership.view.members) == 2)
"""


@pytest.mark.parametrize("point", ["c.proposed", "c.view_logged:2", "c.view_sent_some:2", "c.plan_logged", "c.welcomed"])
def test_it_may_die_at_any_point_of_what_it_does(tmp_path, point):
    """While a worker dies and comes back: the next coordinator keeps what was promised, and all end with the same bits."""
    flags = ("--policy", "accordion", "--set", "regime.window=5 steps", "--set", "regime.interval=1")
    code, finals, said = launch(tmp_path, A_WORKER_DIES, *flags, PS_ACCORDION_CRASH_AT=point)
    assert code == 0, said
    assert len(finals) == 2, said
    assert len(set(finals.values())) == 1, said
    assert [start["term"] for start in events(tmp_path, "coordinator", "start")] == [1, 2]
    views = {event["p"]: event["members"] for event in events(tmp_path, "coordinator", "view")}
    assert sorted(views) == sorted(set(views))
    assert views[max(views)] == [[0, views[max(views)][0][1]], [1, 3]]
