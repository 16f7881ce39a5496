"""A server that dies: it is waited for, known by its boots when it is back, and named when it is lost."""

import pytest
from coordinating import Job, alive, answers, leave, server
from machines import BOOT, named, notes, sends

from ps_accordion.coordinator.views import Views
from ps_accordion.wire import messages as m


def job_with_state(**options) -> Job:
    """Return a job whose servers keep their state."""
    return Job(**({"run_directory": "/run"} | options)).started().declared()


def live(job: Job, seconds: float, *, servers=(0, 1)) -> list:
    """Let time pass while the workers, and these servers, say that they live."""
    actions, view = [], job.machine.view.p
    layouts = [(0, job.layout.digest)]
    for _ in range(round(seconds / 0.1)):
        for slot in range(job.settings.workers.count):
            actions += job.say(b"w%d" % slot, alive(slot, view=view))
        for number in servers:
            actions += job.say(b"s%d" % number, server(number, view=view, layouts=layouts))
        actions += job.later(0.1)
    return actions


def back(job: Job, number: int = 1, *, address: str = "", boot: int | None = None, view: int = 1, lost: str = "") -> list:
    """Say what a server says that has been started again."""
    was = server(number) if boot is None else server(number, boot=boot)
    said = m.ServerAlive(number, address or was.address, was.shards, [(0, job.layout.digest)], view, {}, lost)
    return job.say(b"new s%d" % number, said)


def test_a_server_whose_connection_breaks_is_noticed_within_a_second():
    """It is noted with its number; nobody is told that the run is over."""
    job = job_with_state()
    assert job.machine.lost(b"s1", job.now) == []
    actions = live(job, 1.0, servers=[0])
    assert notes(actions, "gone") == [{"server": 1, "why": "has closed its connection"}]
    assert sends(actions, m.Abort) == []


def test_a_server_with_the_same_boots_is_the_same_server():
    """At the same address nothing else changes; its peer is the new one."""
    job = job_with_state()
    job.machine.lost(b"s1", job.now)
    live(job, 1.0, servers=[0])
    actions = back(job)
    assert [note["server"] for note in notes(actions, "back")] == [1]
    assert named(actions) == ["Pulse"]
    assert not job.machine.servers[1].gone
    assert notes(live(job, 3.0), "proposal") == []


def test_a_server_that_knows_an_older_view_is_told_the_last_one():
    """It may have died before it obeyed."""
    job = job_with_state()
    assert answers(back(job, view=-1), b"new s1")[-1] == job.machine.view


def test_a_server_at_another_address_needs_a_view():
    """With the same members: workers learn from it where the shards are."""
    job = job_with_state()
    job.machine.lost(b"s1", job.now)
    live(job, 1.0, servers=[0])
    back(job, address="tcp://127.0.0.1:7777")
    (proposal,) = notes(job.later(0.1), "proposal")
    assert proposal["members"] == job.machine.view.members
    for number in (0, 1):
        boot = server(number).shards[0][1]
        actions = job.say(b"new s1" if number else b"s0", m.Frozen(2, number, boot, 1, [(0, 3, 1)]))
    (view,) = sends(actions, m.View)
    assert view.message.members == [(0, 1), (1, 2)]
    assert [address for _, _, address in view.message.shards] == ["tcp://127.0.0.1:5000", "tcp://127.0.0.1:7777"]
    assert view.message.cuts == [(0, 4, 1)]
    assert notes(job.later(0.1), "proposal") == []


def blank(lost: str = "") -> Job:
    """Return a job whose server 1 has come back with another boot, and in which both servers have promised."""
    job = job_with_state()
    job.machine.lost(b"s1", job.now)
    live(job, 1.0, servers=[0])
    job.said = back(job, boot=99, view=-1, lost=lost)
    (freeze,) = sends(job.later(0.1), m.Freeze)
    assert {b"new s1", b"s0", b"w0", b"w1"} == set(freeze.peers)
    actions = job.say(b"s0", m.Frozen(2, 0, server(0).shards[0][1], 1, [(0, 6, 1)]))
    actions += job.say(b"new s1", m.Frozen(2, 1, 99, -1, [(0, -1, -1)]))
    assert sends(actions, m.View) == []
    return job


@pytest.mark.parametrize("lost", ["", "shard-1.state is gone"])
def test_a_server_that_comes_back_without_its_memory_begins_anew(lost):
    """What is lost is named. Workers promise too; the view begins with the round that is open at the one that is furthest."""
    job = blank(lost)
    (item,) = notes(job.said, "lost")
    assert (item["who"], item["norm"]) == ("shard 1", None)
    assert item["why"].startswith(lost or "nothing of it was found")
    assert sends(job.say(b"w0", m.Promise(2, 0, 1, [(0, 6, 1, True)])), m.View) == []
    (view,) = sends(job.say(b"w1", m.Promise(2, 1, 2, [(0, 7, 1, True)])), m.View)
    assert view.message.restore == [(1, 99)]
    assert view.message.cuts == [(0, 7, 1)]
    assert answers(back(job, boot=99, view=-1), b"new s1")[-1] == view.message


def test_who_is_lost_twice_before_a_view_has_lost_one_memory():
    """What came between had nothing to lose; the last one has all of it again."""
    job = job_with_state()
    job.machine.lost(b"s1", job.now)
    live(job, 1.0, servers=[0])
    back(job, boot=98, view=-1)
    job.machine.lost(b"new s1", job.now)
    live(job, 1.0, servers=[0])
    (item,) = notes(back(job, boot=99, view=-1), "lost")
    assert (item["who"], item["incarnation"], item["successor"]) == ("shard 1", BOOT, 99)
    (found,) = notes(job.say(b"new s1", m.Books(1, whole=[(1, 99)])), "found")
    assert found == {"who": "shard 1", "incarnation": BOOT}


def test_a_shard_that_is_blank_still_makes_workers_promise_again():
    """It has the boot of the last view, and nobody has restored it when the next one is made."""
    job = blank()
    for slot in (0, 1):
        job.say(b"w%d" % slot, m.Promise(2, slot, slot + 1, [(0, 7, 1, True)]))
    job.machine.lost(b"w1", job.now)
    actions = [action for _ in range(9) for action in [*job.say(b"w0", alive(0, view=2)), *job.later(0.1)]]
    assert notes(actions, "proposal")[0]["p"] == 3
    job.say(b"s0", m.Frozen(3, 0, server(0).shards[0][1], 2, [(0, 6, 1)]))
    assert sends(job.say(b"new s1", m.Frozen(3, 1, 99, 2, [(0, -1, -1)], True)), m.View) == []
    (view,) = sends(job.say(b"w0", m.Promise(3, 0, 1, [(0, 7, 1, True)])), m.View)
    assert (view.message.restore, view.message.cuts) == ([(1, 99)], [(0, 7, 1)])


def test_a_shard_that_has_not_seen_the_view_that_restores_it_is_still_blank():
    """It has the boot of that view, and says nothing of being blank, because it knows no view at all."""
    job = blank()
    for slot in (0, 1):
        job.say(b"w%d" % slot, m.Promise(2, slot, slot + 1, [(0, 7, 1, True)]))
    job.machine.lost(b"w1", job.now)
    for _ in range(9):
        job.say(b"w0", alive(0, view=2))
        job.later(0.1)
    job.say(b"s0", m.Frozen(3, 0, server(0).shards[0][1], 2, [(0, 6, 1)]))
    assert sends(job.say(b"new s1", m.Frozen(3, 1, 99, -1, [(0, -1, -1)])), m.View) == []
    (view,) = sends(job.say(b"w0", m.Promise(3, 0, 1, [(0, 7, 1, True)])), m.View)
    assert (view.message.restore, view.message.cuts) == ([(1, 99)], [(0, 7, 1)])


def test_workers_that_have_not_answered_are_asked_on_while_nobody_else_has_the_state():
    """What asks them was lost, for as long as a link was cut: they live, and would wait for a question that never came again."""
    job = blank()
    actions = [
        action
        for _ in range(round(job.settings.timeouts.dead / 0.1) + 5)
        for action in [*live(job, 0.1, servers=[0]), *back(job, boot=99, view=-1)]
    ]
    assert [gone["slot"] for gone in notes(actions, "gone")] == [0, 1]
    assert notes(actions, "proposal") == []
    (freeze,) = sends(live(job, 0.1, servers=[0]), m.Freeze)
    assert {b"w0", b"w1"} == set(freeze.peers)
    for slot in (0, 1):
        job.say(b"w%d" % slot, m.Promise(2, slot, slot + 1, [(0, 7, 1, True)]))
    (view,) = sends(live(job, 0.1, servers=[0]), m.View)
    assert (view.message.members, view.message.restore) == ([(0, 1), (1, 2)], [(1, 99)])


def test_a_worker_that_does_not_promise_is_taken_out():
    """It lives, but does not answer: the others get their shard back after `timeouts.dead`."""
    job = blank()
    job.say(b"w0", m.Promise(2, 0, 1, [(0, 7, 1, True)]))
    actions = [
        action
        for _ in range(round(job.settings.timeouts.dead / 0.1) + 5)
        for action in [*live(job, 0.1, servers=[0]), *back(job, boot=99, view=-1)]
    ]
    (gone,) = notes(actions, "gone")
    assert (gone["slot"], gone["why"]) == (1, "has not answered for 10 s, though a shard has to be restored")
    assert notes(actions, "proposal")[-1]["members"] == [(0, 1)]
    job.say(b"s0", m.Frozen(3, 0, server(0).shards[0][1], 1, [(0, 6, 1)]))
    job.say(b"new s1", m.Frozen(3, 1, 99, -1, [(0, -1, -1)]))
    (view,) = sends(job.say(b"w0", m.Promise(3, 0, 1, [(0, 7, 1, True)])), m.View)
    assert view.message.members == [(0, 1)]
    assert view.message.restore == [(1, 99)]


def test_a_shard_that_is_lost_before_the_first_round_after_a_checkpoint_needs_no_results():
    """It has read the checkpoint again."""
    views, begun = Views(), {0: 12}
    views.first({0: 1}, [(0, 5, "tcp://127.0.0.1:5000")], begun)
    views.propose({0: 1})
    views.worker_promised(m.Promise(2, 0, 1, [(0, 12, -1, False)]))
    shards = [(0, 6, "tcp://127.0.0.1:5000")]
    assert views.unrestorable(shards, [0], begun) == []
    assert views.unrestorable(shards, [0], {}) == [0]
    assert views.commit(shards, donor=0, layouts=[0]).cuts == [(0, 12, -1)]


def test_a_shard_that_nobody_can_restore_ends_the_run():
    """Who is furthest has taken over a state, and the results of the round before are nowhere."""
    job = blank()
    job.say(b"w0", m.Promise(2, 0, 1, [(0, 6, 1, True)]))
    (abort,) = sends(job.say(b"w1", m.Promise(2, 1, 2, [(0, 7, -1, False)])), m.Abort)
    assert "shard 1 has lost its memory, and nobody has the last results of layout 0" in abort.message.reason


def test_a_second_process_with_the_number_of_one_that_lives_is_refused():
    """It has other boots; the run goes on."""
    job = job_with_state()
    (refused,) = answers(back(job, boot=99, view=-1), b"new s1")
    assert "server number 1 is taken by another process" in refused.reason
    assert job.machine.phase == "running"


def test_a_server_may_be_replaced_before_the_first_view():
    """Nothing has begun, so nothing is lost."""
    job = Job()
    job.say(b"s1", server(1))
    job.machine.lost(b"s1", job.now)
    job.later(1.0)
    actions = back(job, boot=99, view=-1)
    assert named(actions) == ["Pulse"]
    assert job.machine.servers[1].shards == ((1, 99),)


def test_a_server_that_does_not_come_back_ends_the_run():
    """After `timeouts.server`, counted from its last sign of life; the reason says what is lost with it."""
    job = job_with_state(timeouts_server=20.0)
    job.machine.lost(b"s1", job.now)
    assert sends(live(job, 19.0, servers=[0]), m.Abort) == []
    (abort, *_) = sends(live(job, 2.0, servers=[0]), m.Abort)
    assert abort.message.culprit == "server 1"
    assert abort.message.reason == (
        "server 1 has closed its connection, and was not started again within 20 s (timeouts.server); "
        "the residuals of shard 1 are lost with it"
    )


def test_nobody_is_stuck_or_deadlocked_while_a_server_is_away():
    """All wait for it, for longer than `timeouts.stuck`; when it is back they have as long again."""
    job = job_with_state(timeouts_stuck=5.0, timeouts_join=5.0)
    job.machine.lost(b"s1", job.now)
    actions = []
    for _ in range(200):
        for slot in (0, 1):
            waits = m.Alive(slot, slot + 1, 1, [(0, 3, 0)], True, False, "", False, [0])
            actions += job.say(b"w%d" % slot, waits)
        job.say(b"s0", server(0, view=1, layouts=[(0, job.layout.digest)]))
        actions += job.later(0.1)
    actions += back(job)
    for slot in (0, 1):
        job.say(b"w%d" % slot, m.Alive(slot, slot + 1, 1, [(0, 3, 0)], True, False, "", False, [0]))
    actions += job.later(0.1)
    assert sends(actions, m.Abort) == []
    assert notes(actions, "proposal") == []


def test_the_memory_of_another_run_is_refused():
    """It knows a view that this run has not made."""
    job = Job()
    (refused,) = answers(back(job, 0, view=3), b"new s0")
    assert "server 0 is in view 3 of a run that this coordinator does not know" in refused.reason
    assert job.machine.servers == {}


def test_a_server_that_moves_when_workers_have_finished_ends_the_run_well():
    """There are no views any more, and who waits for its word that all have finished would wait for ever."""
    job = job_with_state()
    assert named(job.say(b"w0", leave(0))) == []
    back(job, address="tcp://127.0.0.1:7777")
    (ended,) = sends(job.later(0.1), m.Ended)
    assert {b"w0", b"w1"} < set(ended.peers)
