"""A shard between two views: it promises, finishes nothing, and obeys no view that is older than its promise."""

from machines import BOOT, Member, layout_of, sends, settings_of, view_of

from ps_accordion.server.shard import Shard
from ps_accordion.wire import messages as m


class Job:
    """A shard with three keys and three members."""

    def __init__(self) -> None:
        self.settings = settings_of(workers_count=3)
        self.layout = layout_of(self.settings)
        self.members = [Member(slot, self.settings, self.layout) for slot in range(3)]
        self.shard = Shard(0, BOOT, self.settings)
        self.shard.on_layout(0, self.layout)
        self.shard.on_view(view_of(self.settings))

    def push(self, slot: int, key: int, round_: int, **fields) -> list:
        """Hand a push of data to the shard; return the results that it makes."""
        member = self.members[slot]
        return sends(self.shard.on_push(member.peer, *member.data(key, round_, **fields)), m.Result)

    def round(self, key: int, round_: int) -> list:
        return [self.push(slot, key, round_) for slot in range(3)][-1]

    def frozen(self, p: int) -> m.Frozen:
        (send,) = self.shard.on_freeze(m.Freeze(p))
        assert send.peers == ("coordinator",)
        return send.message

    def view(self, p: int, slots: list[int], cut: int, **fields) -> list:
        return sends(self.shard.on_view(view_of(self.settings, p=p, slots=slots, cuts=[(0, cut, 1)], **fields)), m.Result)


def test_a_promise_says_how_far_the_slowest_key_is():
    """Per layout, with the view that it was finished under; -1 before the first round."""
    job = Job()
    assert job.frozen(2) == m.Frozen(2, 0, BOOT, 1, [(0, -1, -1)])
    job = Job()
    for key, rounds in ((0, 2), (1, 1), (2, 2)):
        for round_ in range(rounds):
            assert job.round(key, round_)
    assert job.frozen(2) == m.Frozen(2, 0, BOOT, 1, [(0, 0, 1)])


def test_a_frozen_shard_finishes_nothing():
    """Pushes are held; the view that follows lets them count."""
    job = Job()
    job.frozen(2)
    assert job.round(0, 0) == []
    (result,) = job.view(2, [0, 1, 2], 0)
    assert (result.message.round, result.message.epoch) == (0, 2)


def test_pushes_of_who_is_out_do_not_count():
    """Held or coming: the rounds go on with the others, and the sum is theirs."""
    job, alone = Job(), Job()
    job.push(1, 0, 0)
    job.push(0, 0, 0)
    job.frozen(2)
    assert job.view(2, [0, 2], 0) == []
    assert job.push(1, 0, 0) == []
    (result,) = job.push(2, 0, 0)
    assert len(result.peers) == 2
    alone.shard.on_view(view_of(alone.settings, p=2, slots=[0, 2], cuts=[(0, 0, -1)]))
    alone.push(0, 0, 0)
    (expected,) = alone.push(2, 0, 0)
    assert bytes(result.payload[0]) == bytes(expected.payload[0])
    assert (job.shard.records[0, 0].residual() == alone.shard.records[0, 0].residual()).all()


def test_a_view_older_than_the_promise_is_not_obeyed():
    """A higher proposal has been promised already: what follows it decides."""
    job = Job()
    job.frozen(3)
    job.view(2, [0, 2], 0)
    assert job.shard.epoch == 1
    assert job.round(0, 0) == []
    job.view(3, [0, 2], 0)
    assert job.shard.epoch == 3


def test_a_freeze_that_a_view_has_overtaken_is_late():
    """Nothing is promised, so nothing stops."""
    job = Job()
    job.view(3, [0, 1, 2], 0)
    assert job.shard.on_freeze(m.Freeze(3)) == []
    assert job.round(0, 0)


def test_a_round_beyond_the_cut_is_undone_and_made_again_with_the_others():
    """The residual it started from is there again; the same gradients without the lost worker give what they would have given."""
    job, alone = Job(), Job()
    for key in range(3):
        job.round(key, 0)
        alone.round(key, 0)
    job.round(1, 1)  # key 1 has finished what keys 0 and 2 have not
    job.frozen(2)
    job.view(2, [0, 2], 1)
    assert job.shard.records[0, 1].round == 0
    alone.shard.on_view(view_of(alone.settings, p=2, slots=[0, 2], cuts=[(0, 1, 1)]))
    for each in (job, alone):
        each.again = {slot: each.members[slot] for slot in (0, 2)}
    kept = [(slot, alone.members[slot].data(1, 1)) for slot in (0, 2)]
    for slot, pushed in kept:
        mine = sends(job.shard.on_push(job.members[slot].peer, *pushed), m.Result)
        theirs = sends(alone.shard.on_push(alone.members[slot].peer, *pushed), m.Result)
    assert bytes(mine[0].payload[0]) == bytes(theirs[0].payload[0])
    assert mine[0].message == theirs[0].message
    assert (job.shard.records[0, 1].residual() == alone.shard.records[0, 1].residual()).all()


def test_a_new_member_has_the_donors_state():
    """It counts among those that may hand it out after a JOIN, if the donor does; who left does not."""
    job = Job()
    job.round(0, 0)
    record = job.shard.records[0, 0]
    assert record.current == {0, 1, 2}
    job.shard.on_view(m.View(2, [(0, 1), (1, 9)], [(0, 1, 1)], [(0, BOOT, "")], [], 0, []))
    assert record.current == {0, 1}
    record.current = frozenset({0})
    job.shard.on_view(m.View(3, [(0, 1), (1, 10)], [(0, 1, 1)], [(0, BOOT, "")], [], 1, []))
    assert record.current == {0}
