"""Workers that go while the others stay, and workers that come in addition."""

import pytest
from coordinating import answers, join
from machines import named, notes, sends
from msgspec import structs

from ps_accordion.coordinator import history
from ps_accordion.coordinator.machine import Coordinator
from ps_accordion.errors import ConfigError
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Record

from .test_views import Running

GOODBYE = m.Leave(1, 2, "", 0, early=True, flushed=[(0, 4)])
ACCOUNT = m.Account(1, 2, [], 4, 0.5, final=True, whole=False)


def records(actions):
    """Return the kinds of records among the actions."""
    return [action.fields["what"] for action in actions if isinstance(action, Record)]


def leaving(**options):
    """Return a job that worker 1 leaves; what followed is in `told`."""
    job = Running(**options)
    job.live(0.5)
    assert job.say(b"w1", GOODBYE) == []  # its account has not come: it says so again
    job.say(b"w1", ACCOUNT)
    job.told = job.say(b"w1", GOODBYE)
    job.quiet.add(b"w1")
    return job


def test_who_has_handed_over_all_goes_at_once_and_nothing_is_lost():
    """It hears its own message back once the log has it; the next view is proposed with that, and is no death."""
    job = leaving()
    assert records(job.told) == ["left", "proposed"]
    assert answers(job.told, b"w1") == [GOODBYE]
    assert {peer for send in sends(job.told, m.Freeze) for peer in send.peers} == {b"s0", b"s1"}
    actions = job.promise(2)
    assert sends(actions, m.View)[0].message.members == [(0, 1), (2, 3)]
    assert notes(actions, "lost") == []
    assert answers(job.say(b"w1", GOODBYE), b"w1") == [GOODBYE]  # the first one may have been lost
    job.machine.lost(b"w1", job.now)
    assert notes(job.live(10), "gone") == []
    verdict = job.machine.run.accounts.verdict(job.machine.views.members, [], ended=False)
    assert verdict.lost == []


def test_the_next_coordinator_knows_who_has_left():
    """It waits for nobody who said goodbye, and says the same to who has not heard it."""
    job = Running()
    log = [{"what": "joined", "slot": slot, "incarnation": slot + 1, "token": "t", "restart": 0} for slot in range(3)]
    view = job.machine.view
    log += [history.viewed(view, [(1, 2)]).fields, history.accounted(ACCOUNT).fields, history.left(1, 2, {0: 4}).fields]
    job.machine = Coordinator(job.settings, job.now, records=log)
    assert answers(job.say(b"w1", GOODBYE), b"w1") == [GOODBYE]
    job.quiet.add(b"w1")
    actions = job.live(0.5)
    assert notes(actions, "proposal")[0]["members"] == [(0, 1), (2, 3)]
    assert notes(job.live(6), "gone") == []


def test_below_the_minimum_a_leaver_goes_and_the_others_wait():
    """It is not held back; that the rounds stand still is said, and that they go on when another has come in its place."""
    job = leaving(workers_minimum=3)
    assert answers(job.told, b"w1") == [GOODBYE]
    actions = job.told + job.live(1)
    assert not sends(actions, m.Freeze)
    assert notes(actions, "waiting")[0]["missing"] == "worker 1 (workers.minimum is 3)"
    (welcome,) = answers(job.say(b"x", join(1, token="another")), b"x")
    assert (welcome.slot, welcome.incarnation) == (1, 4)
    job.say(b"x", m.Alive(1, 4, 1, [], False, False, "", True))
    actions = job.later(0.1)
    assert notes(actions, "resumed")[0]["after_s"] == pytest.approx(1.1)
    actions = job.promise(2)
    assert sends(actions, m.View)[0].message.members == [(0, 1), (1, 4), (2, 3)]
    assert notes(actions, "lost") == []


def test_a_round_that_is_taken_back_takes_back_what_was_handed_over_in_it():
    """A shard has lost it, and with it the residual: an item of unknown norm, once."""
    job = leaving()
    actions = job.promise(2, done=[(0, 3, 1)])
    assert sends(actions, m.View)[0].message.cuts == [(0, 4, 1)]
    (item,) = notes(actions, "lost")
    assert (item["who"], item["incarnation"], item["norm"]) == ("worker 1", 2, None)
    assert "made again" in item["why"]
    assert job.machine.run.left == {}


def test_one_that_was_taken_out_before_it_could_say_so_has_lost_nothing():
    """It was thought dead, but its round counts: the item that was made of it is none."""
    job = Running()
    job.quiet.add(b"w1")
    job.live(5)
    assert notes(job.promise(2), "lost")[0]["who"] == "worker 1"
    job.say(b"w1", ACCOUNT)
    actions = job.say(b"w1", GOODBYE)
    assert (records(actions), answers(actions, b"w1")) == (["left"], [GOODBYE])
    assert job.machine.run.accounts.verdict(job.machine.views.members, [], ended=False).lost == []


def test_one_that_had_finished_when_it_was_taken_out_has_lost_its_residuals():
    """It has nothing to come back for, and goes with them: the item stays, for the next coordinator too, and the others go on."""
    job = Running()
    job.quiet.add(b"w1")
    job.live(5)
    view = sends(job.promise(2), m.View)[0].message
    job.say(b"w1", ACCOUNT)
    goodbye = structs.replace(GOODBYE, flushed=[])
    actions = job.say(b"w1", goodbye)
    assert (records(actions), answers(actions, b"w1")) == (["left"], [goodbye])
    assert [item.who for item in job.machine.run.accounts.verdict(job.machine.views.members, [], ended=False).lost] == [
        "worker 1"
    ]
    assert not job.machine.run.ending
    log = [history.viewed(view, [(1, 2)]).fields, history.accounted(ACCOUNT).fields, history.left(1, 2, {}).fields]
    assert history.History.of(log).settled == set()


def test_a_run_has_room_for_as_many_as_it_says():
    """Without `workers.maximum` it is full; with it, others get a rank above those of the first."""
    job = Running()
    assert answers(job.say(b"x", join(3)), b"x")[0].reason == "expected a worker rank of 0 to 2 (workers.count = 3), got 3"
    job = Running(workers_maximum=4)
    (welcome,) = answers(job.say(b"x", join(-1, token="more")), b"x")
    assert (welcome.slot, welcome.incarnation) == (3, 4)
    assert "is full: workers.maximum = 4" in answers(job.say(b"y", join(-1, token="once more")), b"y")[0].reason
    job.say(b"x", m.Alive(3, 4, 1, [], False, False, "", True))
    assert named(job.later(0.1))[0] == "Freeze"
    view = sends(job.promise(2), m.View)[0].message
    assert (view.members, view.donor) == ([(0, 1), (1, 2), (2, 3), (3, 4)], 0)


def test_less_room_than_workers_is_refused_at_the_start():
    """Nobody could ever train."""
    with pytest.raises(ConfigError, match=r"workers\.maximum is 2; expected 0, or at least workers\.count, 3"):
        Running(workers_maximum=2)


def test_a_view_is_made_when_all_have_promised_and_one_taken_for_dead_is_heard_again():
    """The last promise came when nobody wanted that view, and nothing else comes to make it."""
    job = Running(workers_minimum=2)
    job.quiet.add(b"w1")
    job.live(5)  # proposal 2 is without worker 1
    job.quiet.add(b"w2")
    job.live(5)
    assert not sends(job.promise(2), m.View)
    job.quiet.discard(b"w2")
    assert sends(job.live(1), m.View)[0].message.members == [(0, 1), (2, 3)]


def test_who_came_back_and_has_finished_ends_the_rounds_for_the_next_coordinator_too():
    """It does not declare its layouts again, so a sign of life has to say that it has trained; until then its goodbye waits."""
    job = Running()
    log = [{"what": "joined", "slot": slot, "incarnation": slot + 1, "token": "t", "restart": 0} for slot in range(3)]
    log += [history.layout(0, job.layout.table).fields, history.opened(0, range(3)).fields]
    log += [{"what": "joined", "slot": 1, "incarnation": 4, "token": "u", "restart": 0}]
    log += [history.viewed(structs.replace(job.machine.view, p=2, members=[(0, 1), (1, 4), (2, 3)]), [(1, 2)]).fields]
    job.machine = Coordinator(job.settings, job.now, records=log)
    goodbye = m.Leave(1, 4, "", 0)
    assert job.say(b"w1", goodbye) == []
    assert records(job.say(b"w1", m.Alive(1, 4, 2, [(0, 5, 0)], True, True, "", False))) == ["ending"]
    job.say(b"w1", goodbye)
    assert notes(job.live(6), "proposal") == []


@pytest.mark.parametrize("leaver", [False, True])
def test_a_run_whose_workers_were_all_replaced_has_not_ended(leaver):
    """Nobody has finished: it waits for one that has the state, and then says why it cannot go on."""
    job = leaving(workers_minimum=3) if leaver else Running()
    replaced = (0, 2) if leaver else (0, 1, 2)
    for slot in replaced:
        job.quiet.add(b"w%d" % slot)
        assert isinstance(answers(job.say(b"x%d" % slot, m.Join(f"again {slot}", slot, {}, 1)), b"x%d" % slot)[0], m.Welcome)
    actions = job.live(3)
    assert (named(actions).count("Ended"), job.machine.phase) == (0, "running")
    actions += job.live(10)
    assert notes(actions, "waiting")[-1]["missing"].endswith("(nobody else has the model's state)")
    for slot in replaced:
        job.machine.run.workers[slot].seen = job.now + 1000  # they live, and wait
    (abort,) = sends(job.live(job.settings.timeouts.join + 1), m.Abort)[:1]
    assert "nobody else has the model's state" in abort.message.reason


def test_those_that_leave_all_at_once_end_the_run_though_one_was_replaced():
    """Nothing is left to do, and nothing is lost."""
    job = leaving(workers_count=2, workers_minimum=2)
    job.say(b"x", join(1, token="another"))
    job.say(b"w0", m.Account(0, 1, [], 4, 0.5, final=True, whole=False))
    assert "Ended" in named(job.say(b"w0", m.Leave(0, 1, "", 0, early=True, flushed=[(0, 4)])))


def test_what_a_leaver_said_last_is_no_deadlock():
    """Below the minimum it stays in the view, and its last sign of life may name another model than the others'."""
    job = Running(workers_minimum=3)
    job.fields = {slot: {"rounds": [6, 6], "waits": [1]} for slot in range(3)}
    job.live(0.5)
    job.say(b"w1", ACCOUNT)
    job.say(b"w1", GOODBYE)
    job.quiet.add(b"w1")
    job.fields = {slot: {"rounds": [6, 6], "waits": [0]} for slot in (0, 2)}
    actions = job.live(job.settings.timeouts.join - 5)
    assert notes(actions, "error") == []
    assert notes(actions, "waiting")
