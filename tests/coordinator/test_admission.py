"""Who is let into a run: in any order, with any loss, and each refusal with both values."""

import itertools

import pytest
from coordinating import Job, alive, answers, everybody, join, server
from hypothesis import given
from hypothesis import strategies as st
from machines import BOOT, named, notes, sends

from ps_accordion.errors import CodecError, ConfigError, WireError
from ps_accordion.wire import messages as m


@pytest.mark.parametrize("order", list(itertools.permutations(["w0", "w1", "s0", "s1"])), ids="-".join)
def test_any_order_of_joins_makes_the_same_view(order):
    """The view comes with the last of them, goes to all, and names members in slot order and shards in order of number."""
    job = Job()
    for position, name in enumerate(order):
        number = int(name[1])
        message = join(number, token=f"t{number}") if name[0] == "w" else server(number)
        actions = job.say(name.encode(), message)
        assert ("View" in named(actions)) == (position == 3)
    send = sends(actions, m.View)[0]
    assert set(send.peers) == everybody(job)
    view = send.message
    slots = [int(name[1]) for name in order if name[0] == "w"]
    assert view.members == [(0, 1 + slots.index(0)), (1, 1 + slots.index(1))]
    assert view.shards == [(0, BOOT, "tcp://127.0.0.1:5000"), (1, BOOT, "tcp://127.0.0.1:5001")]
    assert (view.p, view.cut_of(0), view.donor) == (1, (0, -1), 0)


def test_workers_without_a_rank_get_the_free_ones():
    """Each its own, though they ask alike."""
    job = Job(workers_count=3)
    job.say(b"b", join(1))
    (first,) = answers(job.say(b"a", join(-1, token="a")), b"a")
    (second,) = answers(job.say(b"c", join(-1, token="c")), b"c")
    assert [(first.slot, first.incarnation), (second.slot, second.incarnation)] == [(0, 2), (2, 3)]


def test_a_repeated_join_gets_the_same_welcome():
    """The welcome was lost: the same token gets the same place, on whatever connection it asks from."""
    job = Job()
    (welcome,) = answers(job.say(b"w0", join(0)), b"w0")
    assert (welcome.slot, welcome.incarnation, welcome.terms) == (0, 1, job.settings.terms())
    assert answers(job.say(b"again", join(0)), b"again") == [welcome]
    job.say(b"w1", join(1))
    job.say(b"s0", server(0))
    assert set(sends(job.say(b"s1", server(1)), m.View)[0].peers) == {b"again", b"w1", b"s0", b"s1"}


def test_a_lost_view_is_sent_again():
    """To a worker and to a server whose sign of life does not show it; not to those that have it."""
    job = Job().started()
    view = job.machine.view
    assert answers(job.say(b"w0", alive(0, view=-1)), b"w0") == [m.Pulse(), view]
    assert answers(job.say(b"s1", server(1)), b"s1") == [m.Pulse(), view]
    assert answers(job.say(b"w0", alive(0)), b"w0") == [m.Pulse()]
    assert answers(job.say(b"s1", server(1, view=1)), b"s1") == [m.Pulse()]


def refused(job: Job, message: m.Message) -> str:
    """Return why somebody is not let in; it must be told, noted, and change nothing."""
    workers, servers = dict(job.machine.workers), dict(job.machine.servers)
    actions = job.say(b"x", message)
    (answer,) = answers(actions, b"x")
    assert isinstance(answer, m.Refused)
    assert answer.token == getattr(message, "token", "")
    assert [note["reason"] for note in notes(actions, "refused")] == [answer.reason]
    assert (job.machine.workers, job.machine.servers) == (workers, servers)
    return answer.reason


def test_each_refusal_names_both_values():
    """What the joiner has, and what the job has."""
    job = Job()
    job.say(b"w0", join(0))
    assert "seed is 5 at worker 1 and 0 in this job" in refused(job, join(1, seed=5))
    assert "codec.name is 'dense' at worker 1 and 'topk'" in refused(job, join(1, **{"codec.name": "dense"}))
    assert "the worker that joins" in refused(job, join(-1, seed=5))
    assert "knows a setting 'codec.colour'" in refused(job, join(1, **{"codec.colour": "red"}))
    assert "rank 0 is taken" in refused(job, join(0, token="another"))
    assert "0 to 1 (workers.count = 2), got 2" in refused(job, join(2))
    job.say(b"w1", join(1))
    assert "full: workers.count = 2" in refused(job, join(-1, token="late"))
    assert "server numbers 0 to 1, got 2" in refused(job, server(2))
    assert "holds shards [1, 2], this job expects [0]" in refused(job, server(0, shards=[(1, BOOT), (2, BOOT)]))
    job.say(b"s0", server(0))
    assert "server number 0 is taken by another process, at tcp://127.0.0.1:5000" in refused(job, server(0, boot=9))


def test_settings_that_agree_are_not_refused():
    """A joiner that was told the same value as the job is let in."""
    assert isinstance(answers(Job().say(b"w0", join(0, seed=0, **{"codec.name": "topk"})), b"w0")[0], m.Welcome)


def test_settings_that_cannot_work_are_refused_at_the_start():
    """Not when the first model is declared, with everybody waiting for an answer."""
    for option, error in (("regime_policy", ConfigError), ("codec_name", CodecError), ("regime_window", ConfigError)):
        with pytest.raises(error, match="nonsense"):
            Job(**{option: "nonsense"})
    with pytest.raises(CodecError, match="7"):
        Job(codec_heavy=7.0)


def test_garbage_is_answered_with_what_is_wrong_with_it():
    """A process of another release learns both versions."""
    machine = Job().machine
    actions = machine.garbage(b"x", WireError("protocol version 9 from there, 1 here"))
    assert answers(actions, b"x") == [m.Refused("", "protocol version 9 from there, 1 here")]
    assert machine.phase == "gathering"


@given(st.lists(st.sampled_from(["w0", "w1", "s0", "s1", "alive0", "alive1", "tick"]), max_size=30), st.integers(0, 255))
def test_a_gathering_survives_loss_and_repetition(steps, lost):
    """Whatever is repeated and whatever answers are lost, repeating all requests once more gets everybody in, each once."""
    job = Job()
    table = {"w0": (b"w0", join(0)), "w1": (b"w1", join(1)), "s0": (b"s0", server(0)), "s1": (b"s1", server(1))}
    for step in steps:
        if step == "tick":
            job.later(0.1)
        elif step in table:
            job.say(*table[step])
        else:
            slot = int(step[-1])
            if slot in job.machine.workers:
                job.say(b"w%d" % slot, alive(slot, view=-1, incarnation=job.machine.workers[slot].incarnation))
    for peer, message in table.values():
        assert not any(isinstance(answer, m.Refused) for answer in answers(job.say(peer, message), peer))
    assert job.machine.phase == "running"
    assert sorted(incarnation for _, incarnation in job.machine.view.members) == [1, 2]
