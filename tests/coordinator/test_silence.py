"""A peer that freezes is noticed within 3 s, one that dies within 1 s; what follows from that comes later."""

import pytest
from coordinating import Job, alive, leave, server
from machines import notes

LAST_WORD = 0.4
"""Seconds between the last sign of life and the fault, at most: a heartbeat."""


def noticed(job: Job, quiet: str, *events: str, limit: float = 20.0) -> dict[str, float]:
    """Let all but one live, and return how many seconds after its last word each of these events was noted."""
    began, found = job.now, dict[str, float]()
    view = job.machine.view.p
    while job.now - began < limit and set(events) - found.keys():
        for slot in range(job.settings.workers.count):
            if quiet != f"worker {slot}":
                job.say(b"w%d" % slot, alive(slot, view=view))
        for number in range(job.settings.servers.count):
            if quiet != f"server {number}":
                job.say(b"s%d" % number, server(number, view=view, layouts=[(0, job.layout.digest)]))
        actions = job.later(0.1)
        for event in events:
            if notes(actions, event):
                found.setdefault(event, job.now - began)
    return found


@pytest.mark.parametrize("who", ["worker 1", "server 0"])
def test_a_frozen_peer_is_noticed_within_three_seconds_and_taken_for_dead_later(who):
    """Its name is in the note; eviction stays at `timeouts.dead`, also for the whole run's sake."""
    job = Job(run_directory="/run").started().declared()
    times = noticed(job, who, "silent", "gone")
    assert times["silent"] + LAST_WORD <= 3.0
    assert times["gone"] >= 10.0


@pytest.mark.parametrize("who", ["worker 1", "server 0"])
def test_a_peer_that_speaks_again_is_noted_with_how_long_it_was_silent(who):
    """And nothing else has happened: same view, nobody gone."""
    job = Job(run_directory="/run").started().declared()
    noticed(job, who, "silent")
    said = alive(1) if who == "worker 1" else server(0, view=1, layouts=[(0, job.layout.digest)])
    job.say(b"w1" if who == "worker 1" else b"s0", said)
    actions = job.later(0.1)
    [note] = notes(actions, "heard")
    assert note["name"] == who
    assert 2.0 < note["after_s"] < 3.0
    assert notes(actions, "gone") == notes(actions, "proposal") == []


@pytest.mark.parametrize("who", ["worker 1", "server 0"])
def test_a_dead_peer_is_noticed_within_a_second(who):
    """Its connection broke, and it does not come again."""
    job = Job(run_directory="/run").started().declared()
    job.machine.lost(b"w1" if who == "worker 1" else b"s0", job.now)
    assert noticed(job, who, "gone")["gone"] <= 1.0


def test_a_worker_that_has_left_is_not_silent():
    """Nobody waits for it."""
    job = Job().started().declared()
    job.say(b"w1", leave(1))
    assert noticed(job, "worker 1", "silent", limit=5.0) == {}


@pytest.mark.parametrize("options", [{"run_directory": "/run"}, {}])
def test_a_coordinator_that_was_stopped_blames_nobody(options):
    """It has heard nobody for minutes because it did not listen: no eviction, no view, no end of the run."""
    job = Job(**options).started().declared()
    job.now += 200.0
    actions = job.machine.away(200.0, job.now)
    assert notes(actions, "away") == [{"for_s": 200.0}]
    actions = job.later(0.1)
    assert job.machine.phase == "running"
    assert [notes(actions, event) for event in ("silent", "gone", "proposal", "error")] == [[], [], [], []]


def test_a_peer_that_dies_while_the_coordinator_is_stopped_is_noticed_afterwards():
    """As soon as if it had died when the coordinator went on."""
    job = Job(run_directory="/run").started().declared()
    job.now += 60.0
    job.machine.away(60.0, job.now)
    times = noticed(job, "worker 1", "silent", "gone")
    assert times["silent"] + LAST_WORD <= 3.0
    assert times["gone"] <= 11.0
