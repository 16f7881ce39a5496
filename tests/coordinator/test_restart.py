"""A coordinator that goes on from the records of one before: it keeps every word that was given."""

import numpy as np
import pytest
from coordinating import Job, alive, answers, join, leave, server
from machines import TABLE, named, notes, sends
from restarting import ACCORDION, Durable, training

from ps_accordion.coordinator import history
from ps_accordion.coordinator.history import History
from ps_accordion.coordinator.machine import Coordinator
from ps_accordion.errors import ConfigError, RunAborted
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Record, Stop


def test_a_restart_alone_changes_nothing():
    """The view stays, nobody is asked to promise anything, and all are known by their signs of life."""
    job = training()
    view = job.machine.view
    job.restart()
    assert (job.machine.view, job.machine.phase) == (view, "running")
    for _ in range(20):
        assert set(named(job.beat())) == {"Pulse"}
    assert job.machine.view == view


def test_members_have_a_grace_to_be_heard():
    """Who is not heard within `timeouts.dead` of the restart is gone; before that, no view is made for anybody's sake."""
    job = training()
    job.restart()
    began = job.now
    job.machine.lost(b"w2", job.now)  # of another life: that connection is nobody's
    while not sends(actions := job.beat(b"w1"), m.Freeze):
        assert job.now - began <= 4.5
    assert job.now - began > 4.0
    assert [note["slot"] for note in notes(actions, "gone")] == [1]
    view = sends(job.promise(2), m.View)[0].message
    assert view.members == [(0, 1), (2, 3)]
    assert view.donor == 0


def test_no_server_is_given_up_before_it_could_speak():
    """But one that never does ends the run, as ever."""
    job = training()
    job.restart()
    for _ in range(8):
        assert not sends(job.beat(b"s0"), m.Abort)
    assert sends(job.beat(b"s0"), m.Abort)[0].message.culprit == "server 0"


def test_a_proposal_without_a_view_is_followed_by_a_higher_one():
    """Shards may have promised the lower number, and finish nothing until they see a view; although nobody is gone now."""
    job = training()
    for _ in range(10):
        if sends(job.beat(b"w1"), m.Freeze):
            break
    job.restart()
    assert job.promise(2) == []  # nobody has asked for it in this life
    (freeze,) = sends(job.beat(), m.Freeze)
    assert freeze.message.p == 3
    view = sends(job.promise(3), m.View)[0].message
    assert (view.p, view.members) == (3, [(0, 1), (1, 2), (2, 3)])
    assert not sends(job.beat(), m.Freeze)


def test_no_view_is_made_before_all_have_been_heard():
    """Whether somebody has the state is not in the log: a donor that waits in `join()` would hand out none."""
    job = training()
    while not sends(job.beat(b"w1"), m.Freeze):
        pass
    job.restart()
    assert not sends(job.beat(b"w0"), m.Freeze)
    job.say(b"w0", m.Alive(0, 1, 1, [(0, 5, 0)], False, False))
    (freeze,) = sends(job.later(0.1), m.Freeze)
    assert sends(job.promise(freeze.message.p), m.View)[0].message.donor == 1


def test_a_welcome_that_was_lost_with_its_coordinator_is_said_again():
    """The same token has the same incarnation, and no other process gets that number."""
    job = Durable()
    (welcome,) = answers(job.say(b"w0", join(0)), b"w0")
    job.restart()
    assert answers(job.say(b"new", join(0)), b"new") == [welcome]
    job.restart()
    (other,) = answers(job.say(b"w1", join(1)), b"w1")
    assert other.incarnation == welcome.incarnation + 1
    assert "taken" in answers(job.say(b"x", join(0, token="other")), b"x")[0].reason


def test_a_run_that_was_gathering_goes_on_gathering():
    """Workers keep their places; servers say again who they are."""
    job = Durable()
    for slot in range(3):
        job.say(b"w%d" % slot, join(slot))
    job.say(b"s0", server(0))
    job.restart()
    job.say(b"s1", server(1))
    assert job.machine.phase == "gathering"
    job.say(b"s0", server(0))
    assert (job.machine.phase, job.machine.view.members) == ("running", [(0, 1), (1, 2), (2, 3)])


def test_who_was_removed_stays_removed():
    """An incarnation that a view has taken out is told so by every later coordinator, with the same cuts."""
    job = training()
    while not sends(job.beat(b"w1"), m.Freeze):
        pass
    job.promise(2)
    view = job.machine.view
    job.restart()
    assert view.removed == [(1, 2, 0, 5)]
    assert answers(job.say(b"w1", alive(1, incarnation=2)), b"w1") == [m.Pulse(), view]
    (welcome,) = answers(job.say(b"w1", m.Join("anew", 1, {})), b"w1")
    assert welcome.incarnation == 4


def test_layouts_are_known_and_who_was_not_told_hears_when_it_asks():
    """With whether the rounds had begun without it; one that differs is still refused."""
    job = training()
    job.restart()
    job.beat()
    ready = m.Ready(0, job.layout.digest)
    assert ready in answers(job.declare(1), b"w1")
    job.say(b"x", m.Join("again", 1, {}, restart=1))
    job.say(b"x", m.Declare(1, 4, 0, job.layout.digest), job.layout.table)
    job.restart()
    job.beat()
    again = m.Declare(1, 4, 0, job.layout.digest)
    assert m.Ready(0, job.layout.digest, True) in answers(job.say(b"x", again, job.layout.table), b"x")


def test_a_layout_that_was_not_open_opens_when_all_have_said_so_again():
    """Workers repeat a declaration until they hear that it is ready."""
    job = Durable().started()
    job.declare(0)
    job.declare(1)
    job.restart()
    job.beat()
    assert not sends(job.declare(2), m.Ready)
    job.declare(0)
    assert sends(job.declare(1), m.Ready)


def report(job: Job, slot: int, window: int) -> list:
    norms = np.full(len(TABLE), 10.0, np.float32).tobytes()
    return job.say(b"w%d" % slot, m.Report(slot, slot + 1, 0, window, 10 * window + 9, 0.1, 1.0), norms)


def planned(job: Job, windows: range) -> list[int]:
    """Return the versions of the plans that reports of these windows make."""
    actions = [action for window in windows for slot in range(3) for action in report(job, slot, window)]
    return [send.message.version for send in sends(actions, m.NewPlan)]


def test_no_version_stands_for_two_plans():
    """The next coordinator counts on from the last that left; the plan itself comes with the next windows."""
    job = training(**ACCORDION)
    before = planned(job, range(3))
    job.restart()
    job.beat()
    after = planned(job, range(3, 6))
    assert before
    assert min(after) > max(before)


def test_a_drop_of_the_rate_is_one_although_the_coordinator_has_changed():
    """All tensors turn light at once, as if it had never been killed."""
    job = training(**ACCORDION)
    planned(job, range(3))
    job.restart()
    job.beat()
    actions = [action for slot in range(3) for action in job.say(b"w%d" % slot, m.Rate(slot, slot + 1, 0, 40, 0.01))]
    assert "dropped from 0.1 to 0.01" in notes(actions, "plan")[0]["reason"]


def test_who_comes_after_a_restart_makes_all_tensors_light():
    """A plan of the coordinator before may be in force, and this one has no statistics to judge it by."""
    job = training(**ACCORDION)
    planned(job, range(3))
    job.restart()
    job.beat()
    job.say(b"x", m.Join("again", 1, {}, restart=1))
    job.beat(b"w1")
    job.promise(2)
    job.say(b"w1", m.Alive(1, 4, 2, [], False, False, "", True))
    job.later(0.1)
    (plan,) = notes(job.promise(3), "plan")
    assert plan["critical"] == [True] * len(plan["critical"])


def test_the_end_stays_the_end():
    """No view follows after a worker's rounds have ended; who speaks after the end hears it; the exit code is the same."""
    job = training()
    job.say(b"w0", leave(0))
    job.restart()
    assert job.machine.phase == "ending"
    for _ in range(20):
        assert not sends(job.beat(b"w1"), m.Freeze)
    job.say(b"w0", leave(0))
    assert sends(job.say(b"w2", leave(2)), m.Ended)
    job.restart()
    assert (job.machine.phase, job.machine.over) == ("ended", m.Ended())
    assert answers(job.say(b"w0", leave(0)), b"w0") == [m.Ended()]
    for name in ("worker 0", "worker 1", "worker 2", "server 0"):
        assert job.say(b"x", m.Bye(name)) == []
    assert job.say(b"x", m.Bye("server 1")) == [Stop(0)]


@pytest.mark.parametrize("said", ["a sign of life", "a promise"])
def test_who_has_seen_the_end_says_so_before_a_view_begins_it_anew(said):
    """Its goodbye was lost with its coordinator, and a shard has lost its memory: a view would make the last round again."""
    job = training()
    job.restart()
    done = m.Alive(0, 1, 1, [(0, 5, 0)], True, True) if said == "a sign of life" else None
    actions = job.beat(b"w0")
    actions += job.say(b"w0", done or m.Alive(0, 1, 1, [(0, 5, 0)], True, False))
    if done is None:
        assert job.machine.phase == "running"
        actions += job.say(b"w0", m.Promise(2, 0, 1, [(0, 5, 1, True)], True))
    assert job.machine.phase == "ending"
    assert [record.fields for record in actions if isinstance(record, Record)][-1] == history.ending().fields
    assert answers(job.say(b"w1", m.Alive(1, 2, 1, [(0, 5, 0)], True, False)), b"w1") == [m.Ended()]


def test_who_says_that_it_is_done_without_having_trained_ends_nothing():
    """A script that wraps no model goes by itself, and the others go on."""
    job = Durable().started()
    job.say(b"w0", m.Alive(0, 1, 1, [], True, True))
    assert job.machine.phase == "running"


def test_an_abort_is_told_by_the_next_coordinator_too():
    """With the first reason, and stops after the grace if nobody asks."""
    job = training()
    job.say(b"w1", leave(1, "it broke", 1))
    job.restart()
    assert answers(job.say(b"s0", server(0)), b"s0") == [m.Abort("worker 1", "it broke")]
    assert job.later(1.0) == []
    assert job.later(job.settings.timeouts.grace) == [Stop(RunAborted.exit_code, "worker 1", "it broke")]


def test_without_a_log_those_who_know_more_are_refused():
    """A coordinator that was started again without one must not begin another run beneath them."""
    job = training()
    job.machine = Coordinator(job.settings, job.now)
    for peer, message in ((b"w0", alive(0)), (b"s0", server(0, view=1))):
        (answer,) = answers(job.say(peer, message), peer)
        assert "is in view 1 of a run that this coordinator does not know" in answer.reason
        assert "run.directory" in answer.reason
    assert not job.machine.servers


def test_a_record_of_another_release_is_refused():
    """What it means is not known, so nothing is built on it."""
    with pytest.raises(ConfigError, match="does not know"):
        History.of([{"what": "moon"}])
