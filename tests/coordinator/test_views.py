"""Views at the coordinator: a death costs the run a view, never a sum; what nobody can go on with ends it."""

import itertools

import pytest
from coordinating import Job, alive, answers, everybody, join, leave, server
from machines import BOOT, named, notes, sends

from ps_accordion.coordinator.membership import LOST_BEATS
from ps_accordion.coordinator.views import Views
from ps_accordion.errors import ConfigError
from ps_accordion.wire import messages as m

SHARDS = [(0, BOOT, "a"), (1, BOOT, "b")]


def frozen(shard: int, p: int, *, epoch: int = 1, done=((0, 4, 1),), boot: int = BOOT) -> m.Frozen:
    return m.Frozen(p, shard, boot, epoch, list(done))


class Running(Job):
    """A job in the middle of training, whose processes all give signs of life but those in `quiet`."""

    def __init__(self, **options) -> None:
        super().__init__(**({"workers_count": 3, "timeouts_dead": 4.0} | options))
        self.started().declared()
        self.quiet: set[bytes] = set()
        self.fields: dict[int, dict] = {}

    def live(self, seconds: float) -> list:
        """Let time pass in steps of half a second; return all actions."""
        actions = []
        for _ in range(round(seconds / 0.5)):
            for slot, incarnation in self.machine.view.members:
                if b"w%d" % slot not in self.quiet:
                    fields = {"round": 5, "synced": True, "ready": False, "waits": []} | self.fields.get(slot, {})
                    layouts = [(layout, round_, 0) for layout, round_ in enumerate(fields.get("rounds", [fields["round"]]))]
                    said = m.Alive(
                        slot,
                        incarnation,
                        self.machine.view.p,
                        layouts,
                        fields["synced"],
                        False,
                        "",
                        fields["ready"],
                        fields["waits"],
                        fields.get("cut", []),
                    )
                    actions += self.say(b"w%d" % slot, said)
            for number in range(2):
                if b"s%d" % number not in self.quiet:
                    actions += self.say(
                        b"s%d" % number, server(number, view=self.machine.view.p, layouts=[(0, self.layout.digest)])
                    )
            actions += self.later(0.5)
        return actions

    def promise(self, p: int, **fields) -> list:
        """Let both shards promise."""
        return [action for shard in range(2) for action in self.say(b"s%d" % shard, frozen(shard, p, **fields))]


def test_a_silent_worker_costs_a_view_without_it():
    """FREEZE to the servers, repeated to those that have not answered; the view with the last promise, with the cut after it."""
    job = Running()
    job.quiet.add(b"w1")
    actions = job.live(5)
    assert notes(actions, "gone") == [{"slot": 1, "incarnation": 2, "why": "has been silent for 4 s"}]
    assert {peer for send in sends(actions, m.Freeze) for peer in send.peers} == {b"s0", b"s1"}
    assert not sends(job.say(b"s0", frozen(0, 2)), m.View)
    (again,) = sends(job.later(0.1), m.Freeze)
    assert again.peers == (b"s1",)
    (send,) = sends(job.say(b"s1", frozen(1, 2, done=[(0, 3, 1)])), m.View)
    assert set(send.peers) >= {b"w0", b"w2", b"s0", b"s1"}
    view = send.message
    assert (view.p, view.members, view.donor) == (2, [(0, 1), (2, 3)], 0)
    assert view.cuts == [(0, 4, 1)]
    assert view.removed == [(1, 2, 0, 4)]
    assert job.machine.phase == "running"


def test_a_broken_connection_is_a_death_if_nothing_is_heard():
    """A process that lives connects anew at once, and is heard."""
    job = Running()
    job.machine.lost(b"w1", job.now)
    job.machine.lost(b"w2", job.now)
    job.say(b"w2", alive(2))
    actions = job.later(LOST_BEATS * job.settings.timeouts.heartbeat + 0.1)
    assert [note["slot"] for note in notes(actions, "gone")] == [1]
    assert sends(actions, m.Freeze)


def test_a_worker_that_is_heard_again_before_the_view_stays():
    """The proposal without it is overtaken by one with all; its incarnation goes on."""
    job = Running()
    job.quiet.add(b"w1")
    assert named(job.live(5)).count("Freeze")
    job.quiet.clear()
    assert [note["slot"] for note in notes(job.live(0.5), "back")] == [1]
    assert job.promise(2) == []  # too late: nobody wants that view any more
    view = sends(job.promise(3), m.View)[0].message
    assert view.members == [(0, 1), (1, 2), (2, 3)]
    assert view.removed == []


def test_a_removed_worker_is_told_and_comes_back_as_a_new_incarnation():
    """It hears the view instead of a refusal; its slot is free for it or another; it is let in when it is ready."""
    job = Running()
    job.quiet.add(b"w1")
    job.live(5)
    job.promise(2)
    assert answers(job.say(b"w1", alive(1)), b"w1") == [m.Pulse(), job.machine.view]
    (welcome,) = answers(job.say(b"w1", join(1, token="anew")), b"w1")
    assert welcome.incarnation == 4
    assert not sends(job.live(0.5), m.Freeze)  # it says nothing yet of being ready
    job.say(b"w1", m.Alive(1, 4, 2, [], False, False, "", True))
    assert sends(job.later(0.1), m.Freeze)
    view = sends(job.promise(3, epoch=2, done=[(0, 9, 2)]), m.View)[0].message
    assert view.members == [(0, 1), (1, 4), (2, 3)]
    assert view.donor == 0
    assert view.removed == [(1, 2, 0, 5)]


def test_who_has_no_connection_to_a_server_is_not_let_in():
    """The others would wait for it until it is taken out again; once it has one, they take it in."""
    job = Running()
    job.quiet.add(b"w1")
    job.live(5)
    job.promise(2)
    job.say(b"w1", join(1, token="anew"))
    job.say(b"w1", m.Alive(1, 4, 2, [], False, False, "", True, cut=[0]))
    assert not sends(job.live(0.5), m.Freeze)
    job.say(b"w1", m.Alive(1, 4, 2, [], False, False, "", True))
    assert sends(job.later(0.1), m.Freeze)


def test_what_was_taken_out_asks_in_vain():
    """The view that let it in was lost on the way, or its word was late: it comes in as another incarnation, or not at all."""
    job = Running()
    job.quiet.add(b"w1")
    job.live(5)
    job.promise(2)
    assert job.machine.view.removed == [(1, 2, 0, 5)]
    job.say(b"w1", m.Alive(1, 2, 2, [(0, 5, 0)], False, False, ready=True))
    assert not sends(job.later(0.1), m.Freeze)


def test_a_run_goes_on_without_all_that_are_gone():
    """They may be heard again: somebody that has never come into the rounds says goodbye meanwhile, and ends nothing."""
    job = Running(workers_maximum=4)
    job.live(0.5)
    job.say(b"w3", m.Join("late", 3, {}))
    for slot in range(3):
        job.machine.lost(b"w%d" % slot, job.now)
    job.say(b"s0", server(0, view=1))
    job.say(b"s1", server(1, view=1))
    assert len(notes(job.later(1.0), "gone")) == 3
    assert not sends(job.say(b"w3", m.Leave(3, 4, "", 0)), m.Ended)
    assert job.machine.phase == "running"


def test_a_restarted_process_takes_its_slot_at_once():
    """Whoever started it knows that the process before it has ended; without that word the rank is taken."""
    job = Running()
    assert "taken" in answers(job.say(b"x", join(1, token="other")), b"x")[0].reason
    (welcome,) = answers(job.say(b"x", m.Join("again", 1, {}, restart=1)), b"x")
    assert (welcome.slot, welcome.incarnation) == (1, 4)
    assert sends(job.live(0.5), m.Freeze)
    assert sends(job.promise(2), m.View)[0].message.members == [(0, 1), (2, 3)]


def test_who_has_no_state_is_no_donor_and_lets_nobody_in():
    """A worker that waits in join() does not apply results: somebody who does hands out the state, or nobody is let in."""
    job = Running()
    job.fields = {0: {"synced": False}}
    job.say(b"x", m.Join("again", 2, {}, restart=1))
    job.quiet.add(b"w2")
    job.live(0.5)
    job.promise(2)
    job.say(b"x", m.Alive(2, 4, 2, [], False, False, "", True))
    job.live(0.5)
    assert sends(job.promise(3, epoch=2), m.View)[0].message.donor == 1
    job.fields = {0: {"synced": False}, 1: {"synced": False}, 2: {"synced": False}}
    job.say(b"y", m.Join("once more", 2, {}, restart=2))
    job.live(0.5)
    job.promise(4, epoch=3)
    job.say(b"y", m.Alive(2, 5, 4, [], False, False, "", True))
    assert not sends(job.live(0.5), m.Freeze)


def test_fewer_workers_than_the_minimum_wait():
    """The view stays, so no round is finished; it is said; the one that comes back makes the next view."""
    job = Running(workers_minimum=3)
    job.quiet.add(b"w1")
    actions = job.live(6)
    assert not sends(actions, m.Freeze)
    assert notes(actions, "waiting")[0]["missing"] == "worker 1 (workers.minimum is 3)"
    job.say(b"x", m.Join("again", 1, {}, restart=1))
    job.say(b"x", m.Alive(1, 4, 1, [], False, False, "", True))
    assert sends(job.later(0.1), m.Freeze)
    assert sends(job.promise(2), m.View)[0].message.members == [(0, 1), (1, 4), (2, 3)]


def test_fewer_than_the_minimum_for_too_long_end_the_run():
    """After `timeouts.join`, naming who is gone."""
    job = Running(workers_minimum=3, timeouts_join=20.0)
    job.quiet.add(b"w1")
    abort, *_ = sends(job.live(30), m.Abort)
    assert abort.message.culprit == "worker 1"
    assert "workers.minimum is 3" in abort.message.reason


def test_more_needed_than_there_are_is_refused_at_the_start():
    """Nobody could ever train."""
    with pytest.raises(ConfigError, match=r"workers\.minimum is 4; expected at most workers\.count, 3"):
        Running(workers_minimum=4)


def test_the_last_state_gone_ends_the_run():
    """Who comes anew has nobody to take the state from."""
    job = Running(timeouts_join=5.0)
    job.quiet |= {b"w0", b"w1", b"w2"}
    abort, *_ = sends(job.live(12), m.Abort)
    assert "nobody else has the model's state" in abort.message.reason


def test_a_worker_that_holds_up_the_others_is_taken_out():
    """It computes while another waits, longer than `timeouts.stuck`; not while it says that it is busy, nor where all compute."""
    job = Running(timeouts_stuck=10.0)
    assert not notes(job.live(40), "gone")
    job.fields = {0: {"waits": [0]}, 1: {"waits": [0]}}
    job.say(b"w2", alive(2, incarnation=3, busy="evaluation"))
    assert notes(job.live(9), "gone") == []
    (gone,) = notes(job.live(4), "gone")
    assert gone["slot"] == 2
    assert "while others wait" in gone["why"]


def test_workers_that_wait_for_each_other_end_the_run():
    """Two models taken in another order: each waits for a round that the other never begins. Who waits where is said."""
    job = Running(timeouts_stuck=10.0, workers_count=2)
    job.fields = {0: {"rounds": [5, 5], "waits": [0]}, 1: {"rounds": [5, 5], "waits": [1]}}
    abort, *_ = sends(job.live(12), m.Abort)
    assert "worker 0 in round 5 of model 0, worker 1 in round 5 of model 1" in abort.message.reason


@pytest.mark.parametrize("rounds", [[[5], [6]], [[5, 5], [6, 5]]])
def test_who_waits_for_results_that_another_has_is_in_no_deadlock(rounds):
    """Its link to a server is cut or slow. However long the others wait for it, they do so for what will come."""
    job = Running(timeouts_stuck=10.0, workers_count=2)
    job.fields = {slot: {"rounds": theirs, "waits": [len(theirs) - 1 if slot else 0]} for slot, theirs in enumerate(rounds)}
    assert not sends(job.live(60), m.Abort)


def test_who_has_finished_is_in_no_deadlock():
    """It pushes EMPTY in all models, so whatever another waits for is complete: a link to a server is cut or slow."""
    job = Running(timeouts_stuck=10.0, workers_count=2)
    job.fields = {0: {"rounds": [10, 9], "waits": [0, 1]}, 1: {"rounds": [10, 9], "waits": [1]}}
    assert not sends(job.live(60), m.Abort)


def test_who_has_finished_ends_no_deadlock_of_others():
    """Each of the others waits for a round that the other never begins."""
    job = Running(timeouts_stuck=10.0)
    job.fields = {slot: {"rounds": [5, 5], "waits": waits} for slot, waits in enumerate([[0], [1], [0, 1]])}
    abort, *_ = sends(job.live(12), m.Abort)
    assert "worker 1 in round 5 of model 1, worker 2 in round 5 of model 0" in abort.message.reason


def test_a_worker_without_a_connection_to_a_server_is_taken_out():
    """All would wait for it for ever, though both live. A connection that comes back in time counts anew."""
    job = Running(timeouts_stuck=10.0)
    job.fields = {slot: {"waits": [0]} for slot in range(3)}
    job.fields[1]["cut"] = [1]
    assert notes(job.live(9), "gone") == []
    job.fields[1]["cut"] = []
    assert notes(job.live(5), "gone") == []
    job.fields[1]["cut"] = [1]
    assert notes(job.live(9), "gone") == []
    (gone,) = notes(job.live(2), "gone")
    assert gone == {"slot": 1, "incarnation": 2, "why": "has had no connection to server 1 for 10 s, which lives"}


def test_views_do_not_change_once_rounds_have_ended():
    """The END changes no state, so who dies now is not missed; the run ends when the others have left."""
    job = Running()
    job.say(b"w0", leave(0))
    assert job.machine.phase == "ending"
    job.quiet |= {b"w0", b"w1"}
    assert not sends(job.live(6), m.Freeze)
    (ended,) = sends(job.say(b"w2", leave(2)), m.Ended)
    assert set(ended.peers) == everybody(job)


def test_a_worker_that_never_trained_may_leave():
    """It was in no round: the others go on in a view without it."""
    job = Job(workers_count=2).started()
    job.say(b"w1", leave(1))
    assert job.machine.phase == "running"
    assert sends(job.later(0.1), m.Freeze)


# ---------------------------------------------------------------- cuts


def views_after(*reports: m.Frozen, p: int = 2, members=None) -> m.View:
    """Return the view that these promises make, after a first view of slots 0, 1, 2."""
    views = Views()
    views.first({0: 1, 1: 2, 2: 3}, SHARDS)
    proposal = views.propose(members or {0: 1, 2: 3})
    assert proposal.p == p
    for report in reports:
        views.promised(report)
    assert views.missing(SHARDS) == []
    return views.commit(SHARDS, donor=0, layouts=[0])


@pytest.mark.parametrize(("first", "second", "cut"), [(4, 4, 5), (4, 5, 5), (5, 4, 5), (-1, 0, 0), (-1, -1, 0)])
def test_the_cut_is_after_the_lowest_finished_round(first, second, cut):
    """What every key has finished counts; a round that some key lacks is taken back everywhere."""
    reports = [
        frozen(0, 2, done=[(0, first, 1 if first >= 0 else -1)]),
        frozen(1, 2, done=[(0, second, 1 if second >= 0 else -1)]),
    ]
    assert views_after(*reports).cuts == [(0, cut, 1 if cut else -1)]


def test_a_shard_that_missed_a_view_is_not_believed_beyond_its_cut():
    """It reports a round that the missed view undid: with it, one round would mix two sets of members."""
    views = Views()
    views.first({0: 1, 1: 2, 2: 3}, SHARDS)
    views.propose({0: 1, 2: 3})
    for report in (frozen(0, 2, done=[(0, 4, 1)]), frozen(1, 2, done=[(0, 3, 1)])):
        views.promised(report)
    assert views.commit(SHARDS, donor=0, layouts=[0]).cut_of(0) == (4, 1)
    views.propose({0: 1})
    views.promised(frozen(0, 3, epoch=1, done=[(0, 4, 1)]))  # has not seen view 2
    views.promised(frozen(1, 3, epoch=2, done=[(0, 4, 2)]))
    assert views.commit(SHARDS, donor=0, layouts=[0]).cut_of(0) == (4, 1)


def test_the_cut_that_removed_a_worker_falls_with_a_later_lower_one():
    """A worker that lives on takes back what was not counted: the lowest cut since it was removed decides."""
    views = Views()
    views.first({0: 1, 1: 2}, SHARDS)
    views.propose({0: 1})
    for shard in range(2):
        views.promised(frozen(shard, 2, done=[(0, 5, 1)]))
    assert views.commit(SHARDS, donor=0, layouts=[0]).removed == [(1, 2, 0, 6)]
    views.propose({0: 1, 1: 3})
    for shard in range(2):
        views.promised(frozen(shard, 3, epoch=2, done=[(0, 4, 1)]))
    assert views.commit(SHARDS, donor=0, layouts=[0]).removed == [(1, 2, 0, 5)]


def test_nothing_counts_of_who_was_removed_before_a_layout_began():
    """The view after that has a cut of the layout, which is that of the workers who stayed."""
    views = Views()
    views.first({0: 1, 1: 2}, SHARDS)
    for p, layouts, members in ((2, [], {0: 1}), (3, [0], {0: 1, 1: 3})):
        views.propose(members)
        for shard in range(2):
            views.promised(frozen(shard, p, epoch=p - 1, done=[(0, 4, p - 1)]))
        view = views.commit(SHARDS, donor=0, layouts=layouts)
    assert view.cut_of(0) == (5, 2)
    assert view.removed == [(1, 2, 0, 0)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(2))))
def test_promises_for_another_number_are_late(order):
    """A proposal that was overtaken: what was promised for it does not count for the next."""
    views = Views()
    views.first({0: 1, 1: 2}, SHARDS)
    views.propose({0: 1})
    views.promised(frozen(order[0], 2))
    views.propose({0: 1, 1: 2})
    views.promised(frozen(order[1], 2))
    assert views.missing(SHARDS) == [0, 1]


def test_a_promise_of_another_boot_does_not_count():
    """It is of a shard that is not there any more."""
    views = Views()
    views.first({0: 1, 1: 2}, SHARDS)
    views.propose({0: 1})
    views.promised(frozen(0, 2, boot=BOOT + 1))
    assert views.missing(SHARDS) == [0, 1]
