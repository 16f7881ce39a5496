"""A shard that has lost its memory folds again what workers kept, and has every bit of its residuals back; or says why not."""

import numpy as np
import pytest
from machines import Member, gaussian, layout_of, notes, sends, settings_of, view_of

from ps_accordion.regimes import Choice
from ps_accordion.server.durable import ShardStore, Snapshots
from ps_accordion.server.replaying import Base, _bases
from ps_accordion.server.restoring import Restored
from ps_accordion.server.shard import Shard
from ps_accordion.wire import messages as m
from ps_accordion.worker.retained import Retained

LEVELS = {"topk": (0.1, 0.01), "random_block": (0.2, 0.05), "dense": (16.0, 16.0), "onebit": (512.0, 8192.0)}
"""Light and heavy of each codec."""
LEVELS |= {"int": (8.0, 2.0), "natural": (8.0, 8.0), "qsgd": (8.0, 4.0), "terngrad": (2.0, 2.0)}
CASES = [(codec, done) for codec in LEVELS for done in ((1, 3, 4, 9, 11) if codec in ("topk", "random_block") else (11,))]
"""Codec and rounds that are done: where in the copies a shard is lost has nothing to do with how it adds up."""
ROUNDS = 6
"""Whose pushes are kept: a copy is taken of every third round."""


class Job:
    """A shard, three workers that keep their pushes, and what outlives the shard's memory."""

    def __init__(self, codec="topk", *, rounds=ROUNDS, copies=True, slots=(0, 1, 2), begins=0):
        light, heavy = LEVELS[codec]
        self.settings = settings_of(
            workers_count=3,
            codec_name=codec,
            codec_light=light,
            codec_heavy=heavy,
            codec_residual_at_switch="clip",
            servers_replay_rounds=rounds,
        )
        self.layout = layout_of(self.settings)
        self.members = {slot: Member(slot, self.settings, self.layout) for slot in range(3)}
        self.kept = {slot: Retained(0, self.layout, rounds=rounds) for slot in range(3)}
        self.levels = [Choice(codec, light), Choice(codec, heavy)]
        self.copies = Snapshots(None, shard=0, job="") if copies else None
        self.begins = (lambda _, key: Restored(begins, gaussian(key.elements, 9), 0, 0, 0, b"")) if begins else None
        self.p, self.done, self.epoch, self.skipped = 0, begins, -1, False
        self.start()
        self.view(slots)

    def start(self):
        """Start the shard, with nothing but the copies."""
        store = ShardStore.open(None, shard=0, job="")
        self.shard = Shard(0, store.boot, self.settings, store=store, snapshots=self.copies, restore=self.begins)
        self.shard.on_layout(0, self.layout)

    def view(self, slots=(0, 1, 2), *, restore=False, incarnations=None):
        self.p, self.slots = self.p + 1, slots
        members = [(slot, (incarnations or {}).get(slot, slot + 1)) for slot in slots]
        boot = self.shard.boot
        cuts = [(0, self.done, self.epoch)] if self.done else []
        blank = [(0, boot)] if restore else []
        self.seen = view_of(self.settings, p=self.p, members=members, cuts=cuts, shards=[(0, boot, "")], restore=blank)
        for kept in self.kept.values():
            kept.seen(self.seen)
        return self.shard.on_view(self.seen)

    def rounds(self, count, *, skip=()):
        """Have the workers push some rounds; in those of `skip` one of them has a gradient for key 1 that is not finite."""
        for round_ in range(self.done, self.done + count):
            pushes = {slot: self.made(slot, round_, round_ in skip) for slot in self.slots}
            for send in self.pushed(pushes):
                for kept in self.kept.values():
                    kept.note(send.message, [bytes(frame) for frame in send.payload])
            for slot in self.slots:
                self.kept[slot].decided(round_, pushes[slot])
            self.done, self.epoch, self.skipped = round_ + 1, self.p, round_ in skip

    def pushed(self, pushes):
        """Have all push, by slot and key; return the results."""
        actions = []
        for key in self.layout.keys:
            for slot in self.slots:
                push, payload = pushes[slot][key.number]
                actions += self.shard.on_push(b"%d" % slot, push, [] if payload is None else [payload.data])
        results = sends(actions, m.Result)
        assert len(results) == len(self.layout.keys)
        return results

    def made(self, slot, round_, skip):
        made = {}
        for key in self.layout.keys:
            choice = None if key.small else self.levels[round_ // 2 % 2]
            member = self.members[slot]
            if skip and slot == 1 and key.number == 1:
                push, frames = member.bare("SKIP", 1, round_, skipped=self.skipped)
            else:
                push, frames = member.data(key.number, round_, choice=choice, skipped=self.skipped)
            made[key.number] = push, np.frombuffer(bytes(frames[0]), np.uint8) if frames else None
        return made

    def lose(self, **view):
        """Lose the shard's memory, and have the workers say what they have; return what was logged."""
        self.start()
        actions = list(self.view(restore=True, **view))
        for slot, _ in self.seen.members:
            for handle, arguments in self.said(slot):
                actions += getattr(self.shard, handle)(*arguments)
        queue = wanted(actions)
        for slot, key, round_ in queue:
            more = self.replayed(slot, key, round_)
            actions += more
            queue += wanted(more)
        return actions

    def said(self, slot):
        """Yield what a worker says to the blank shard of the last view: the method that takes it in, and with what."""
        who, kept, links = (slot, dict(self.seen.members)[slot]), self.kept[slot], {0: "server 0"}
        for send in kept.restores(self.seen, self.done, 0, who=who, server_of=links):
            yield "on_restore", (send.message, send.payload)
        for send in kept.offers(self.seen, {}, who=who, server_of=links):
            yield "on_offer", (b"%d" % slot, send.message)

    def replayed(self, slot, key, round_):
        """Have a worker push again what it pushed in a round that is over."""
        (send,) = self.kept[slot].replays([(key, round_)], {}, boot=self.shard.boot, link="")
        return self.shard.on_replay(b"%d" % slot, send.message, send.payload)

    def state(self):
        """Return all that a fold starts from, of each key."""
        return {where: state_of(record) for where, record in self.shard.records.items()}


def state_of(record):
    halves = [record.halves[record.before], record.halves[record.after]]
    return (
        [None if half is None else half.tobytes() for half in halves],
        (record.round, record.bound, record.bound_before, record.tally, record.tally_before),
        repr(record.result.message),
        b"".join(map(bytes, record.result.frames)),
    )


@pytest.mark.parametrize(("codec", "done"), CASES)
def test_what_was_lost_is_there_again_bit_for_bit(codec, done):
    """Residual, undo, account and bound, through skipped rounds, levels that turn lighter, and a member that came meanwhile."""
    job = Job(codec, slots=(0, 2))
    job.rounds(min(done, 7), skip={2, 6})
    job.view()
    job.rounds(done - job.done, skip={8})
    before = job.state()
    job.lose()
    assert job.state() == before
    assert job.shard.whole
    replays = job.shard._replays
    assert [replays._results, replays._pushes, replays._bases] == [{}, {}, {}], "memory that nobody needs"
    residuals = [record.residual() for record in job.shard.records.values()]
    assert job.shard.norm() == pytest.approx((done - 1, np.linalg.norm(np.concatenate(residuals))))
    job.rounds(3)
    after = job.state()
    other = Job(codec, slots=(0, 2))
    other.rounds(min(done, 7), skip={2, 6})
    other.view()
    other.rounds(done - other.done, skip={8})
    other.view()
    other.view()
    other.rounds(3)
    assert {where: state[0] for where, state in other.state().items()} == {where: state[0] for where, state in after.items()}


def test_a_shard_can_be_lost_again_and_again():
    """Also before it has finished another round; copies that were taken since count, too."""
    job = Job()
    job.rounds(5)
    for _ in range(3):
        before = job.state()
        job.lose()
        job.lose()
        assert job.state() == before
        job.rounds(2)
    assert job.shard.whole


def test_without_copies_a_replay_reaches_back_to_the_beginning_only():
    """As many rounds as workers keep, and no more."""
    job = Job(copies=False)
    job.rounds(ROUNDS)
    before = job.state()
    job.lose()
    assert job.state() == before
    job.rounds(1)
    why = f"there is no copy of round 1 to {ROUNDS}, and nobody has kept round 0"
    assert notes(job.lose(), "begins anew")[0]["why"] == why


def test_where_no_pushes_are_kept_nothing_stays_of_what_workers_gave_back():
    """The shard goes on after each result as it comes, and lets go of it."""
    job = Job(rounds=0)
    job.rounds(2)
    job.lose()
    assert all(record.round == 1 for record in job.shard.records.values())
    assert not job.shard._replays._results


@pytest.mark.parametrize("copies", [True, False])
def test_a_job_that_goes_on_from_a_checkpoint_begins_with_what_that_has(copies):
    """Before the first round after it nothing is lost with a shard; then the checkpoint is what a replay starts from."""
    job = Job(copies=copies, begins=40)
    job.lose()
    assert job.shard.whole
    for _ in range(2):
        job.rounds(3)
        before = job.state()
        job.lose()
        assert job.state() == before
        assert job.shard.whole


def begun_anew(job, **view):
    """Lose what cannot be made again; return why."""
    whys = {note["why"] for note in notes(job.lose(**view), "begins anew")}
    assert not job.shard.whole
    assert all(record.round == job.done - 1 and not record.residual().any() for record in job.shard.records.values())
    assert len(whys) == 1
    return whys.pop()


def test_a_member_that_is_gone_takes_its_pushes_with_it():
    """Whoever has its place now is another. The loss is stated, with its reason; what comes after it can be made again."""
    job = Job()
    job.rounds(5)
    assert begun_anew(job, incarnations={1: 9}) == "what worker 1 pushed in round 4 is not kept any more"
    job = Job()
    job.rounds(5)
    assert begun_anew(job, slots=(0, 2)) == "what worker 1 pushed in round 4 is not kept any more"
    job.rounds(1)
    before = job.state()
    job.lose(slots=(0, 2))
    assert job.state() == before


def test_a_round_that_is_taken_back_and_made_again_leaves_its_copy_as_it_is():
    """Also where it is lost with the shard in between: what lies below it must not give way to a second copy of the same."""
    job = Job()
    job.rounds(6)
    before = job.state()
    pushes = {slot: job.made(slot, 6, skip=False) for slot in job.slots}
    for _ in range(2):
        job.pushed(pushes)
        job.view()
    job.lose()
    assert job.state() == before
    job.pushed(pushes)
    job.lose()
    assert job.state() == before
    assert job.shard.whole


def test_what_only_workers_that_are_gone_had_decided_leaves_no_copy():
    """Their round is made again by the others, from another residual: a copy of the next round is none of that."""
    job = Job()
    job.rounds(5)
    begun_anew(job, incarnations={1: 9})
    for coder in job.members[1].coders:
        coder.incarnation = 9
    job.kept[1].forget()
    job.kept[2]._past.pop()
    job.done, job.epoch = 4, 1
    job.view(slots=(1, 2), incarnations={1: 9})
    job.rounds(1)
    before = job.state()
    assert before[0, 1][0][1] is not None
    job.lose(slots=(1, 2), incarnations={1: 9})
    assert job.state() == before


def test_behind_a_copy_of_a_lower_round_lies_what_has_been_taken_back():
    """It counts no more, until the next copy takes its place."""
    (copies,) = Snapshots(None, shard=0, job="").hold(0, [3])
    for round_, left in [(3, [3]), (6, [6, 3]), (4, [4]), (6, [6, 4])]:
        copies.keep(Base(round_).header())
        assert [base.round for base in _bases(copies)] == left


def test_a_result_that_differs_from_what_workers_had_is_no_replay(monkeypatch):
    """It is said, and the shard begins anew: all replicas stay alike."""
    job = Job()
    job.rounds(5)
    real = m.Replay

    def replay(boot, push, kind="", digest=0):
        return real(boot, push, kind, digest + (push.round == 4))

    monkeypatch.setattr(m, "Replay", replay)
    actions = job.lose()
    assert {note["round"] for note in notes(actions, "replay differs")} == {4}
    whys = [note["why"] for note in notes(actions, "begins anew")]
    assert whys == ["a replay comes to another result than workers had"] * len(job.layout.keys)
    assert not job.shard.whole


def test_a_push_is_asked_for_once_and_again_when_its_worker_offers_again():
    """Whatever else happens meanwhile: others offer, results come, keys go on. On a slow link answers take a while."""
    job = Job()
    job.rounds(5)
    before = job.state()
    job.start()
    job.view(restore=True)
    said = {slot: list(job.said(slot)) for slot in job.slots}
    restores = [actions for part in said.values() for handle, actions in part if handle == "on_restore"]
    offers = {slot: next(arguments for handle, arguments in part if handle == "on_offer") for slot, part in said.items()}
    asked = [push for slot in (0, 1, 2) for push in wanted(job.shard.on_offer(*offers[slot]))]
    assert len(asked) == len(set(asked)) == 3 * 2 * len(job.layout.keys)  # rounds 3 and 4, since the newest copy
    first, *rest = asked
    for arguments in restores:
        assert wanted(job.shard.on_restore(*arguments)) == []
    for slot, key, round_ in rest:
        assert wanted(job.replayed(slot, key, round_)) == []
    assert wanted(job.shard.on_offer(*offers[(first[0] + 1) % 3])) == []
    assert wanted(job.shard.on_offer(*offers[first[0]])) == [first]
    job.replayed(*first)
    assert job.state() == before


def test_workers_hear_of_each_key_that_goes_on():
    """They ask less and less often after pushes that a shard does not answer, and these were of no use to it."""
    job = Job()
    job.rounds(5)
    said = sends(job.lose(), m.Missing)
    assert {(send.message.layout, send.message.round) for send in said} == {(0, 5)}
    assert sorted(key for send in said for key in send.message.keys) == [key.number for key in job.layout.keys]
    assert {send.peers for send in said} == {(b"0", b"1", b"2")}


def wanted(actions):
    """Return slot, key and round of every push that is asked for."""
    return [(int(send.peers[0]), key, round_) for send in sends(actions, m.Recall) for key, round_ in send.message.wanted]


def test_whoever_asks_while_a_loss_is_noted_does_not_hear_that_nothing_is_lost():
    """It is another thread that asks, between any two steps of the shard's own: here before it looks at the keys."""
    job = Job()
    job.rounds(5)
    job.start()
    job.view(restore=True, incarnations={1: 9})
    *others, last = [each for slot in job.slots for each in job.said(slot)]

    def hear(handle, arguments):
        getattr(job.shard, handle)(*arguments)

    class Records(dict):
        def items(self):
            job.shard.records = dict(self)
            hear(*last)
            return job.shard.records.items()

    for each in others:
        hear(*each)
    assert not job.shard._state.anew
    job.shard.records = Records(job.shard.records)
    assert not job.shard.whole
    assert job.shard._state.anew
    assert not any(job.shard._state.is_blank(layout, record) for (layout, _), record in job.shard.records.items())
    assert not job.shard.whole


def test_what_does_not_fit_is_refused():
    """A replay is checked as a push is; one for another boot, or of a key that is not blank, is late."""
    job = Job()
    job.rounds(4)
    push, payload = job.made(0, 4, skip=False)[1]
    assert job.shard.on_replay(b"0", m.Replay(job.shard.boot, push), [payload.data]) == []
    job.start()
    job.view(restore=True)
    assert job.shard.on_replay(b"0", m.Replay(5, push), [payload.data]) == []
    (note,) = notes(job.shard.on_replay(b"0", m.Replay(job.shard.boot, push), [payload.data[:-1]]), "refused")
    assert note["culprit"] == "worker 0"


def test_copies_outlive_the_process_and_their_damage_is_said(tmp_path):
    """The last two of each key; one that is not whole is none, and a file of another job is left alone."""
    copies = Snapshots(tmp_path, shard=0, job="job")
    (first, second) = copies.hold(0, [3, 2000])
    assert first.found() == []
    for number in range(3):
        first.keep(b"header %d" % number, np.full(3, number, np.float32).data)
    second.keep(b"zeros")
    copies.close()
    copies.close()
    (path,) = tmp_path.iterdir()
    again = Snapshots(tmp_path, shard=0, job="job")
    first, second = again.hold(0, [3, 2000])
    assert [header for header, _ in first.found()] == [b"header 2", b"header 1"]
    assert [np.frombuffer(vector, np.float32).tolist() for _, vector in first.found()] == [[2.0] * 3, [1.0] * 3]
    assert second.found() == [(b"zeros", b"")]
    assert again.lost == ""
    again.close()
    path.write_bytes(path.read_bytes()[:-8])
    damaged = Snapshots(tmp_path, shard=0, job="job")
    assert [copy.found() for copy in damaged.hold(0, [3, 2000])] == [[], []]
    assert "holds copies of other keys" in damaged.lost
    damaged.discard()
    assert not tmp_path.exists()
