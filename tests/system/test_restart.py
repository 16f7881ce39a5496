"""A server is killed in the middle of a run and started again: the parameters are those of a run that nothing happened to."""

import functools
import json
import os
import re
from pathlib import Path

import pytest
from launched import events, launch
from suites import usually

SCRIPT = """
import hashlib, json, signal

def kill(name):
    lines = open(os.environ["PS_ACCORDION_CONFIG"].replace("config.toml", "events-launcher.jsonl")).read().splitlines()
    starts = [event for event in map(json.loads, lines) if event["event"] == "start" and event["name"] == name]
    os.kill(starts[-1]["pid"], signal.SIGKILL)

with connect() as session:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    model = DistributedModel(model, session=session)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.Generator().manual_seed(rank)
    for step in range(STEPS):
        if rank == 0 and step in KILLS:
            kill(KILLS[step])
        optimizer.zero_grad()
        model(torch.randn(4, 64, generator=inputs)).square().mean().backward()
        optimizer.step()
bits = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
print("digest", hashlib.sha256(bits).hexdigest(), flush=True)
"""
STEPS = 40
AGAIN = ("--set", "run.restarts=3", "--set", "servers.count=2")
OTHER_PORT = ("--set", "servers.bind=tcp://127.0.0.2:*")
"""Loopback, and not the default, which the launcher would turn into a socket in a file."""


def digest_of(tmp_path, *flags, kills=None, crash=None):
    """Train, and return the digest of the parameters, which both workers must have."""
    if crash:
        os.environ["PS_ACCORDION_CRASH_AT"] = crash
    code, said = launch(tmp_path, f"STEPS, KILLS = {STEPS}, {kills or {}}\n" + SCRIPT, *AGAIN, *flags)
    assert code == 0, said
    digests = re.findall(r"digest ([0-9a-f]{64})", said)
    assert len(digests) == 2, said
    assert len(set(digests)) == 1
    return digests[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the digest of a run in which nothing is killed."""

    @functools.cache
    def digest():
        return digest_of(tmp_path_factory.mktemp("undisturbed"))

    return digest


def restarts(tmp_path):
    """Return how often each process was started again."""
    return {event["name"]: event["restart"] for event in events(tmp_path, "launcher") if event["event"] == "start"}


@pytest.mark.parametrize("point", usually(["s.half:30", "s.layout", "s.marked:30", "s.sent_some:30", "s.view"]))
def test_servers_killed_at_a_point_change_no_bit(tmp_path, undisturbed, point):
    """Both servers come to it; each is killed once."""
    assert digest_of(tmp_path, crash=point) == undisturbed()
    assert restarts(tmp_path) == {"coordinator": 0, "server 0": 1, "server 1": 1, "worker 0": 0, "worker 1": 0}
    assert not list((tmp_path / "run" / "state").glob("*.state")), "the state of a run that is over is removed"


@pytest.mark.parametrize("point", usually(["s.frozen", "s.view:2"]))
def test_servers_killed_between_two_views_change_no_bit(tmp_path, undisturbed, point):
    """One comes back at another address, so that a view must tell the workers; then each dies at its promise, or at the view."""
    assert digest_of(tmp_path, *OTHER_PORT, kills={10: "server 1"}, crash=point) == undisturbed()
    assert restarts(tmp_path)["server 0"] == 1
    views = [event for event in events(tmp_path, "coordinator") if event["event"] == "view"]
    assert len(views) > 1
    assert all(event["members"] == views[0]["members"] for event in views)


@pytest.mark.parametrize("point", usually(["c.welcomed", "c.over_logged"]))
def test_a_coordinator_killed_at_a_point_changes_no_bit(tmp_path, undisturbed, point):
    """While it takes workers in, or when the end is on its disk and nobody has been told."""
    assert digest_of(tmp_path, crash=point) == undisturbed()
    assert restarts(tmp_path) == {"coordinator": 1, "server 0": 0, "server 1": 0, "worker 0": 0, "worker 1": 0}


@pytest.mark.parametrize("point", usually(["c.proposed", "c.view_logged:2", "c.view_sent_some:2"]))
def test_a_coordinator_killed_while_it_makes_a_view_changes_no_bit(tmp_path, undisturbed, point):
    """A server comes back at another address, so there is a view to make; its members, and so every sum, stay."""
    assert digest_of(tmp_path, *OTHER_PORT, kills={10: "server 1"}, crash=point) == undisturbed()
    assert restarts(tmp_path) == {"coordinator": 1, "server 0": 0, "server 1": 1, "worker 0": 0, "worker 1": 0}


@pytest.mark.full
def test_servers_that_are_killed_again_and_again_change_no_bit(tmp_path, undisturbed):
    """In turn, from outside, at whatever they are doing; it is noticed, and told on the screen and in the log."""
    kills = {8: "server 0", 16: "server 1", 24: "server 0"}
    # Half a second is what a server takes to come back, at least: it is missed before.
    assert digest_of(tmp_path, "--set", "timeouts.heartbeat=0.1", kills=kills) == undisturbed()
    assert restarts(tmp_path) == {"coordinator": 0, "server 0": 2, "server 1": 1, "worker 0": 0, "worker 1": 0}
    logged = [event for event in events(tmp_path, "coordinator") if event["event"] in ("gone", "back")]
    assert [event["server"] for event in logged if event["event"] == "gone"] == [0, 1, 0]
    assert [event["server"] for event in logged if event["event"] == "back"] == [0, 1, 0]


@pytest.mark.full
def test_servers_that_are_killed_change_no_bit_where_payloads_are_lent(tmp_path):
    """What they had lent stays readable, and the process that comes after each is lent to anew.

    Rounds go on through its socket until then, and may all be over before; but not while the other server is away.
    """
    dense = ("--set", "codec.name=dense", "--set", "regime.policy=static")
    plain, lent = tmp_path / "plain", tmp_path / "lent"
    plain.mkdir()
    lent.mkdir()
    expected = digest_of(plain, *dense, "--set", "servers.lane=off")
    assert digest_of(lent, *dense, kills={10: "server 1", 20: "server 0", 30: "server 1"}) == expected
    assert (restarts(lent)["server 0"], restarts(lent)["server 1"]) == (1, 2)
    links = [event for event in events(lent, "worker-0") if event["event"] == "lane"]
    assert all(event["push"] and event["pull"] for event in links)
    times = [sum(event["link"] == f"server {number}" for event in links) for number in range(2)]
    assert times in ([2, 2], [2, 3])


LOSE = """
def lose(name, kill=kill):
    import pathlib
    for file in pathlib.Path(os.environ["PS_ACCORDION_CONFIG"]).with_name("state").glob(f"shard-{name[-1]}*"):
        DAMAGE(file)
    kill(name)
kill = lose
"""


def losing_a_shard(tmp_path, damage, *flags):
    """Train while server 1 is killed and its files are damaged; return what was said."""
    script = SCRIPT.replace("\nwith connect", LOSE.replace("DAMAGE", damage) + "\nwith connect")
    code, said = launch(tmp_path, f"STEPS, KILLS = {STEPS}, {{20: 'server 1'}}\n" + script, *AGAIN, *flags)
    assert code == 0, said
    return said


def loses_a_shard(tmp_path, damage, *flags):
    """Lose one; return what was said, once all is as it should be."""
    said = losing_a_shard(tmp_path, damage, *flags)
    digests = re.findall(r"digest ([0-9a-f]{64})", said)
    assert len(digests) == 2
    assert len(set(digests)) == 1, "replicas differ"
    told = events(tmp_path, "coordinator")
    (lost,) = [event for event in told if event["event"] == "lost"]
    assert lost["who"] == "shard 1"
    (ledger,) = [event for event in told if event["event"] == "ledger"]
    assert ledger["balanced"]
    assert [item["who"] for item in ledger["lost"]] == ["shard 1"]
    assert any(event["event"] == "restored" for event in events(tmp_path, "server-1"))
    assert re.search(r"residual lost: shard 1, last heard of after round", said)
    return said


def test_a_server_that_loses_its_files_begins_anew(tmp_path):
    """The run goes on without its residual, all replicas alike; what is lost stands in the events and in the ledger."""
    loses_a_shard(tmp_path, "pathlib.Path.unlink")


@pytest.mark.full
def test_a_server_without_a_directory_begins_anew(tmp_path):
    """What it held is nowhere else."""
    loses_a_shard(tmp_path, "id", "--set", "servers.state_directory=memory")


@pytest.mark.full
def test_a_server_whose_file_is_damaged_begins_anew(tmp_path):
    """The reason says what is wrong with the file, and where it is kept."""
    said = loses_a_shard(tmp_path, '(lambda file: file.write_bytes(b"something else" + file.read_bytes()[14:]))')
    assert re.search(r"starts with b'somethin'", said), said
    assert "kept as *.bad" in said


REPLAY = ("--set", "servers.replay_rounds=6")


@pytest.mark.parametrize(
    ("damage", "flags"),
    [
        pytest.param("pathlib.Path.unlink", (), marks=pytest.mark.full),
        pytest.param("id", ("--set", "servers.state_directory=memory"), marks=pytest.mark.full),
        pytest.param('(lambda file: file.write_bytes(b"something else"))', (), marks=pytest.mark.full),
    ],
)
def test_a_server_that_loses_its_files_has_its_residuals_back_where_pushes_are_kept(tmp_path, undisturbed, damage, flags):
    """Bit for bit: the parameters are those of a run that nothing happened to, and the ledger knows of no loss."""
    said = losing_a_shard(tmp_path, damage, *REPLAY, *flags)
    assert set(re.findall(r"digest ([0-9a-f]{64})", said)) == {undisturbed()}
    assert "shard 1 has every bit of its residuals again" in said
    (ledger,) = [event for event in events(tmp_path, "coordinator") if event["event"] == "ledger"]
    assert (ledger["balanced"], ledger["lost"], ledger["open"]) == (True, [], [])
    (restored,) = [event for event in events(tmp_path, "server-1") if event["event"] == "restored"]
    assert restored["whole"]
    assert not (tmp_path / "run" / "snapshots").exists(), "the copies of a run that is over are removed"


def test_a_state_directory_that_cannot_be_written_is_named_at_the_start(tmp_path):
    """With the code of a wrong setting."""
    (tmp_path / "file").write_text("")
    code, said = launch(tmp_path, "STEPS, KILLS = 2, {}\n" + SCRIPT, "--set", f"servers.state_directory={tmp_path}/file")
    assert code == 2
    assert f"server: {tmp_path}/file cannot be used: it is not a directory" in said


def test_a_full_disk_ends_the_run_with_its_own_code(tmp_path):
    """When the residuals are made, not in the middle of training: here a limit on the size of files stands for the disk."""
    script = "STEPS, KILLS = 2, {}\n" + SCRIPT.replace("nn.Linear(64, 256)", "nn.Linear(64, 2560)").replace(
        "nn.Linear(256, 10)", "nn.Linear(2560, 1000)"
    )
    code, said = launch(tmp_path, script, largest_file=8192)
    assert code == 8
    assert "expected room for" in said


@pytest.mark.full
def test_a_disk_that_fills_up_in_the_middle_ends_the_run_and_names_the_file(tmp_path):
    """Of the run's own files only the logs grow; what was written of them is whole."""
    code, said = launch(tmp_path, "STEPS, KILLS = 20_000, {}\n" + SCRIPT, *AGAIN, largest_file=400)
    assert code != 0
    named = re.findall(r"(\S+\.jsonl): expected to append a line of the log, got: File too large; make room", said)
    assert named, said
    rows = [json.loads(line) for line in Path(named[0]).read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert len(rows) > 100


JUMPS = """
import itertools, time
real, readings = time.time, itertools.count()
time.time = lambda: real() + 3600 * (next(readings) // 3 % 3 - 1)
"""


@pytest.mark.full
def test_a_clock_that_jumps_by_an_hour_changes_nothing(tmp_path, undisturbed, monkeypatch):
    """To and fro with every third reading, in all processes, while a server and the coordinator are killed."""
    (tmp_path / "sitecustomize.py").write_text(JUMPS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert digest_of(tmp_path, kills={10: "server 1", 20: "coordinator"}) == undisturbed()
    times = [event["time"] for event in events(tmp_path, "coordinator")]
    assert max(times) - min(times) > 3000, "the clock did not jump"
    assert restarts(tmp_path) == {"coordinator": 1, "server 0": 0, "server 1": 1, "worker 0": 0, "worker 1": 0}


def test_the_state_of_another_run_is_refused(tmp_path):
    """With the directory and what to do."""
    state = tmp_path / "state"
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    script = "STEPS, KILLS = 2000, {10: 'server 0'}\n" + SCRIPT
    flags = ("--set", f"servers.state_directory={state}", "--set", "timeouts.grace=1", "--set", "run.restarts=0")
    launch(tmp_path / "first", script, *flags)
    assert list(state.glob("*.state"))
    code, said = launch(tmp_path / "second", script, *flags)
    assert code == 2
    assert re.search(r"expected the state of job .*shard-0.state, found that of job .*; name another directory", said), said
