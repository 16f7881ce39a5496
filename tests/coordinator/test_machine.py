"""The coordinator: who is let in, who is told what, and that everything that gets lost is said again."""

import itertools
import math

import numpy as np
import pytest
from coordinating import Job, alive, answers, everybody, join, leave, server
from machines import TABLE, layout_of, named, notes, sends

from ps_accordion.errors import RunAborted
from ps_accordion.layout import Tensor
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Stop

# ---------------------------------------------------------------- layouts


def test_a_model_is_ready_when_all_workers_and_servers_have_it():
    """In any order of declarations and signs of life; before that, nobody is told that it is."""
    for order in itertools.permutations(["w0", "w1", "s0", "s1"]):
        job = Job().started()
        for position, name in enumerate(order):
            number = int(name[1])
            held = [(0, job.layout.digest)]
            actions = job.declare(number) if name[0] == "w" else job.say(name.encode(), server(number, view=1, layouts=held))
            assert ("Ready" in named(actions)) == (position == 3)
        (ready,) = sends(actions, m.Ready)
        assert set(ready.peers) == {b"w0", b"w1"}
        assert ready.message == m.Ready(0, job.layout.digest)


def test_servers_get_a_layout_until_they_show_it():
    """At once, and with each sign of life that lacks it: the first was lost, or the server holds another table."""
    job = Job().started()
    (send,) = sends(job.declare(0), m.NewLayout)
    assert (set(send.peers), send.payload) == ({b"s0", b"s1"}, (job.layout.table,))
    assert job.declare(1) == []
    for layouts in ([], [(0, "f" * 16)], [(1, job.layout.digest)]):
        assert m.NewLayout(0, job.layout.digest) in answers(job.say(b"s0", server(0, view=1, layouts=layouts)), b"s0")


def test_a_lost_ready_is_said_again():
    """A worker declares until it hears: each declaration is answered."""
    job = Job().started().declared()
    assert m.Ready(0, job.layout.digest) in answers(job.declare(1), b"w1")


def test_different_models_end_the_run_and_say_where_they_differ():
    """The first difference, with both shapes and both workers, to everybody."""
    job = Job().started()
    job.declare(0)
    other = layout_of(job.settings, [TABLE[0], Tensor("bias", (11,), "float32"), TABLE[2]])
    actions = job.declare(1, other)
    (abort,) = sends(actions, m.Abort)
    assert set(abort.peers) == everybody(job)
    for words in ("worker 1 and worker 0 hold different models", "'bias'", "10", "11"):
        assert words in abort.message.reason
    assert abort.message.culprit == "worker 1"
    assert job.machine.phase == "aborted"


def test_a_table_that_is_none_is_refused():
    """Random bytes, or none at all, do not end the run of the others."""
    job = Job().started()
    for payload in (None, b"", b"\xff" * 100):
        (answer,) = answers(job.say(b"w0", m.Declare(0, 1, 0, "0" * 16), payload), b"w0")
        assert isinstance(answer, m.Refused)
    assert job.machine.phase == "running"


def test_strangers_are_told_that_they_are_none():
    """Who declares or lives under an incarnation that is not in the run is refused; its leaving and reports end nothing."""
    job = Job().started()
    for message in (m.Declare(0, 9, 0, "0" * 16), alive(0, incarnation=9), alive(7)):
        assert isinstance(answers(job.say(b"x", message), b"x")[0], m.Refused)
    for message in (
        m.Leave(0, 9, "bad", 1),
        m.Report(0, 9, 0, 0, 0, 0.1, 0.1),
        m.Rate(0, 9, 0, 0, 0.1),
        m.Report(0, 1, 5, 0, 0, 0.1, 0.1),
    ):
        assert job.say(b"x", message) == []
    assert job.machine.phase == "running"


# ---------------------------------------------------------------- plans


def report(job: Job, slot: int, window: int, norm: float) -> list:
    norms = np.full(len(TABLE), norm, np.float32).tobytes()
    return job.say(b"w%d" % slot, m.Report(slot, slot + 1, 0, window, 10 * window + 9, 0.1, 1.0), norms)


def test_a_plan_is_repeated_until_every_member_shows_it():
    """To the server that holds key 0, with every tick; the last member's sign of life ends it."""
    job = Job(regime_policy="accordion", regime_interval=1, regime_window="10 steps").started().declared()
    for window in range(3):
        actions = report(job, 0, window, 10.0) + report(job, 1, window, 10.0)
    owner = b"s%d" % job.layout.keys[0].shard
    plans = [send for send in sends(actions, m.NewPlan) if send.peers == (owner,)]
    assert plans
    version = plans[-1].message.version
    for _ in range(3):
        assert [(send.peers, send.message.version) for send in sends(job.later(0.1), m.NewPlan)] == [((owner,), version)]
    job.say(b"w0", alive(0, version=version))
    assert named(job.later(0.1)) == ["NewPlan"]
    job.say(b"w1", alive(1, version=version))
    assert named(job.later(0.1)) == []
    assert notes(actions, "plan")


def test_every_report_is_acknowledged():
    """Also one that comes twice: it is repeated until it is heard."""
    job = Job().started().declared()
    for _ in range(2):
        assert m.Heard(0, 0) in answers(report(job, 1, 0, 1.0), b"w1")


@pytest.mark.parametrize("payload", [None, b"", b"\0" * 4, b"\0" * 13])
def test_norms_of_the_wrong_length_end_the_run(payload):
    """A member that does not know its own model is not to be planned for; it is named."""
    job = Job().started().declared()
    (abort,) = sends(job.say(b"w1", m.Report(1, 2, 0, 0, 9, 0.1, 1.0), payload), m.Abort)
    assert abort.message.culprit == "worker 1"


def test_rates_and_losses_that_are_not_numbers_do_no_harm():
    """They count as unknown."""
    job = Job(regime_policy="accordion", regime_interval=1, regime_window="10 steps").started().declared()
    job.say(b"w0", m.Rate(0, 1, 0, 0, math.nan))
    job.say(b"w0", m.Rate(0, 1, 0, 0, -math.inf))
    norms = np.full(len(TABLE), np.nan, np.float32).tobytes()
    for slot in (0, 1):
        assert job.say(b"w%d" % slot, m.Report(slot, slot + 1, 0, 0, 9, math.inf, math.nan), norms)
    assert job.machine.phase == "running"


# ---------------------------------------------------------------- what they do


def test_who_is_busy_with_what_is_noted_when_it_changes():
    """Once at its beginning and once at its end, however often it is said; each worker by itself, and strangers not at all."""
    job = Job(workers_count=2).started()
    told = []
    said = ((1, ""), (1, "evaluation"), (1, "evaluation"), (0, "saving"), (1, "more"), (1, ""), (0, "saving"), (0, ""))
    for slot, what in said:
        told += notes(job.say(b"w%d" % slot, alive(slot, busy=what)), "busy")
    assert [(note["slot"], note["what"]) for note in told] == [
        (1, "evaluation"),
        (0, "saving"),
        (1, "more"),
        (1, ""),
        (0, ""),
    ]
    assert notes(job.say(b"x", alive(1, incarnation=9, busy="nothing")), "busy") == []


def test_who_is_busy_and_silent_is_dead_all_the_same():
    """Signs of life come from a thread of their own, whatever the script does."""
    job = Job().started()
    job.say(b"w1", alive(1, busy="evaluation"))
    assert notes(silent_after(job, b"w1"), "gone")[0]["slot"] == 1


# ---------------------------------------------------------------- the end


def silent_after(job: Job, quiet: bytes) -> list:
    """Let all but one give signs of life until somebody is taken for dead."""
    for _ in range(60):
        for slot in range(2):
            if quiet != b"w%d" % slot:
                job.say(b"w%d" % slot, alive(slot))
        for number in range(2):
            if quiet != b"s%d" % number:
                job.say(b"s%d" % number, server(number, view=1))
        actions = job.later(0.5)
        if notes(actions, "gone") or sends(actions, m.Abort):
            return actions
    raise AssertionError("nobody noticed")


def test_a_server_that_is_silent_for_too_long_ends_the_run():
    """After `timeouts.dead`, not before; everybody is told who it was."""
    job = Job().started()
    began = job.now
    actions = silent_after(job, b"s0")
    assert job.settings.timeouts.dead < job.now - began <= job.settings.timeouts.dead + 0.5
    (abort,) = sends(actions, m.Abort)
    assert set(abort.peers) == everybody(job)
    assert (abort.message.culprit, abort.message.reason) == ("server 0", "server 0 has been silent for 10 s")


def test_who_joined_and_died_while_others_are_awaited_is_noticed():
    """Not only after the time for joining."""
    job = Job()
    job.say(b"w0", join(0))
    assert named(job.later(9.9)) == []
    assert "worker 0 has been silent" in sends(job.later(0.2), m.Abort)[0].message.reason


def test_who_never_comes_is_named():
    """Every ten seconds in the log, and in the end to those who wait."""
    job = Job(timeouts_join=25.0)
    noted = []
    for _ in range(30):
        job.say(b"w1", join(1))
        job.say(b"s0", server(0))
        actions = job.later(1.0)
        noted += notes(actions, "waiting")
        if sends(actions):
            break
    (abort,) = sends(actions, m.Abort)
    assert set(abort.peers) == {b"w1", b"s0"}
    assert "waited 25 s" in abort.message.reason
    assert "workers [0], servers [1]" in abort.message.reason
    assert [note["missing"] for note in noted] == ["workers [0], servers [1]"] * 2


def test_a_run_ends_when_all_workers_have_left():
    """With the last one, and well; whoever speaks afterwards is told again; when all have said goodbye, it stops at once."""
    job = Job().started()
    assert sends(job.say(b"w1", leave(1))) == []
    assert sends(job.say(b"w1", leave(1))) == []  # repeated until the end
    (ended,) = sends(job.say(b"w0", leave(0)), m.Ended)
    assert set(ended.peers) == everybody(job)
    for peer, message in ((b"w1", leave(1)), (b"s0", server(0)), (b"w0", alive(0)), (b"new", join(1, token="new"))):
        assert answers(job.say(peer, message), peer) == [m.Ended()]
    assert job.later(0.1) == []
    for name in ("worker 0", "server 1", "worker 1", "worker 1"):
        assert job.say(b"x", m.Bye(name)) == []
    assert job.say(b"x", m.Bye("server 0")) == [Stop(0)]


def test_a_worker_that_has_left_may_fall_silent():
    """Its rounds have ended, and its process may be gone while others still work: that is not a death."""
    job = Job().started().declared()
    job.say(b"w1", leave(1))
    for _ in range(40):
        job.say(b"w0", alive(0))
        job.say(b"s0", server(0, view=1))
        job.say(b"s1", server(1, view=1))
        assert sends(job.later(0.5)) == []


@pytest.mark.parametrize(("error", "code", "says"), [("it broke", 1, "it broke"), ("", 3, "worker 1 ended with code 3")])
def test_a_worker_that_leaves_with_an_error_ends_the_run(error, code, says):
    """Everybody learns its reason, and the coordinator's own code says that the run failed."""
    job = Job().started()
    (abort,) = sends(job.say(b"w1", leave(1, error, code)), m.Abort)
    assert set(abort.peers) == everybody(job)
    assert (abort.message.culprit, abort.message.reason) == ("worker 1", says)
    for name in ("worker 0", "worker 1", "server 0"):
        job.say(b"x", m.Bye(name))
    assert job.say(b"x", m.Bye("server 1")) == [Stop(RunAborted.exit_code, "worker 1", says)]


def test_a_fault_of_a_server_ends_the_run():
    """With the culprit that it names, and the server that says so."""
    job = Job().started()
    (abort,) = sends(job.say(b"s1", m.Fault(1, "worker 0", "it pushed nonsense")), m.Abort)
    assert (abort.message.culprit, abort.message.reason) == ("worker 0", "server 1: it pushed nonsense")


def test_the_first_reason_is_the_one_that_counts():
    """What fails afterwards fails because of it."""
    job = Job().started()
    job.say(b"w1", leave(1, "first", 1))
    assert answers(job.say(b"w0", leave(0, "second", 1)), b"w0") == [m.Abort("worker 1", "first")]
    assert answers(job.say(b"s0", m.Fault(0, "server 0", "third")), b"s0") == [m.Abort("worker 1", "first")]
    assert named(job.later(1.0)) == []


def test_lost_goodbyes_do_not_hold_it_up():
    """It stops after `timeouts.grace` in any case; long reasons are cut to what a message may carry."""
    job = Job().started()
    (abort,) = sends(job.say(b"w0", leave(0, "x" * 2000, 1)), m.Abort)
    assert job.later(job.settings.timeouts.grace - 0.1) == []
    assert job.later(0.2) == [Stop(RunAborted.exit_code, "worker 0", "x" * 2000)]
    job = Job().started()
    (abort,) = sends(job.say(b"s0", m.Fault(0, "c" * 64, "x" * 2000)), m.Abort)
    assert len(abort.message.reason) == m.MAX_TEXT


def test_who_was_told_of_the_end_before_it_is_not_waited_for():
    """Rounds have ended, and a sign of life is answered with that: its goodbye comes before the others have left."""
    job = Job().started().declared()
    assert job.say(b"w0", leave(0)) != []
    assert answers(job.say(b"w1", alive(1)), b"w1") == [m.Ended()]
    assert answers(job.say(b"w1", m.Bye("worker 1")), b"w0") == [m.Ended()]
    for name in ("worker 0", "server 0"):
        assert job.say(b"x", m.Bye(name)) == []
    assert job.say(b"x", m.Bye("server 1")) == [Stop(0)]


def test_an_account_counts_until_the_goodbye():
    """Of who was told of the end, or taken for dead, before it could give one: as long as its goodbye is awaited."""
    job = Job().started().declared()
    job.say(b"w0", m.Account(0, 1, [], 3, 1.0, final=True))
    job.say(b"w0", leave(0))
    job.machine.lost(b"w1", job.now)
    job.say(b"s0", server(0, view=1))
    job.say(b"s1", server(1, view=1))
    assert sends(job.later(1.0), m.Ended)
    assert answers(job.say(b"w1", alive(1)), b"w1") == [m.Ended()]
    job.say(b"w1", m.Account(1, 2, [], 3, 1.0, final=True))
    for name in ("worker 0", "server 0", "server 1"):
        assert job.say(b"x", m.Bye(name)) == []
    ledger, stop = job.say(b"w1", m.Bye("worker 1"))
    assert (ledger.fields["lost"], stop) == ([], Stop(0))


def test_nobody_there_means_nobody_to_wait_for():
    """A coordinator that nobody found stops when the time for joining is over."""
    job = Job(timeouts_join=5.0)
    assert named(job.later(5.1)) == ["Abort"]
    (stop,) = job.later(0.1)
    assert stop.code == RunAborted.exit_code
    assert "workers [0, 1], servers [0, 1]" in stop.reason


def test_messages_for_others_are_noted_and_left_alone():
    """A result that strays to the coordinator is not its business."""
    job = Job().started()
    for message in (m.Pulse(), m.Result(0, 0, 0, 1, "END", 0), m.Ended(), job.machine.view):
        assert notes(job.say(b"w0", message), "unexpected") == [{"message": type(message).__name__}]
    assert job.machine.phase == "running"
    assert job.say(b"w0", m.Bye("worker 0")) == []  # before the end it means nothing
