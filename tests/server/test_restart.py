"""A shard that is killed anywhere goes on from what it wrote: the bits of one that nothing happened to."""

import contextlib
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from machines import Member, layout_of, named, notes, plan_bytes, sends, settings_of, view_of
from suites import usually

from ps_accordion import crashpoints
from ps_accordion.codecs import get
from ps_accordion.errors import ConfigError
from ps_accordion.regimes import Choice
from ps_accordion.server import folding
from ps_accordion.server.durable import ShardStore
from ps_accordion.server.shard import Shard
from ps_accordion.wire import messages as m

KEYS = (0, 1, 2)
LEVELS = {"topk": (0.1, 0.01), "random_block": (0.2, 0.05), "dense": (16.0, 16.0)}
"""Light and heavy of each codec."""
LEVELS |= {"int": (8.0, 2.0), "natural": (8.0, 8.0), "onebit": (512.0, 8192.0), "qsgd": (8.0, 4.0), "terngrad": (2.0, 2.0)}
KEEPING = [name for name, (light, _) in LEVELS.items() if get(name).keeps(light)]


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


class Job:
    """A shard in a directory, three members, and a script of steps that may each be done again."""

    def __init__(self, directory, codec="topk", **options):
        light, heavy = LEVELS[codec]
        self.settings = settings_of(
            workers_count=3, codec_name=codec, codec_light=light, codec_heavy=heavy, codec_residual_at_switch="clip", **options
        )
        self.directory = directory
        self.layout = layout_of(self.settings)
        self.members = [Member(slot, self.settings, self.layout) for slot in range(3)]
        self.levels = [Choice(codec, light), Choice(codec, heavy)]
        self.pushes = {}
        self.plans = ()
        self.open()

    def open(self):
        self.store = ShardStore.open(self.directory, shard=0, job="job")
        self.shard = Shard(0, self.store.boot, self.settings, store=self.store)

    def kill(self):
        """Forget all but the files, and start again."""
        self.shard.close()
        self.store._let_go()  # as the kernel does: the lock goes, and nothing is written
        self.open()

    def close(self):
        self.shard.close()
        self.store.close()

    def made(self, slot, key, round_, kind, skipped):
        """Return a push; the same bytes whenever it is asked for again, as a worker keeps them."""
        if (slot, key, round_) not in self.pushes:
            member = self.members[slot]
            choice = None if self.layout.keys[key].small else self.levels[round_ // 2 % 2]
            self.pushes[slot, key, round_] = (
                member.data(key, round_, choice=choice, skipped=skipped)
                if kind == "DATA"
                else member.bare(kind, key, round_, skipped=skipped)
            )
        return self.pushes[slot, key, round_]

    def round(self, key, round_, *, slots=(0, 1, 2), bad=(), skipped=False, plan=()):
        """Have the members push a key's round, those in `bad` a SKIP; return the result."""
        if plan:
            self.shard.on_plan(0, *plan)  # the coordinator repeats it, until all have it
        actions = []
        for slot in slots:
            kind = "SKIP" if slot in bad else "DATA"
            actions += self.shard.on_push(self.members[slot].peer, *self.made(slot, key, round_, kind, skipped))
        results = {(repr(send.message), b"".join(map(bytes, send.payload))) for send in sends(actions, m.Result)}
        assert len(results) == 1, named(actions)
        return results.pop()

    def freeze(self, p):
        (send,) = self.shard.on_freeze(m.Freeze(p))
        fields = {name: getattr(send.message, name) for name in send.message.__struct_fields__}
        return fields | {"boot": 0}

    def view(self, p, slots, cut, epoch):
        shards = [(0, self.store.boot, "")]
        self.shard.on_view(view_of(self.settings, p=p, slots=slots, cuts=[(0, cut, epoch)] if p > 1 else [], shards=shards))
        return self.shard.epoch

    def steps(self):
        """Rounds, a skip, plans, a view that undoes a round of two keys, and one that undoes nothing."""
        yield lambda: self.view(1, [0, 1, 2], 0, -1)
        yield lambda: self.shard.on_layout(0, self.layout)
        first, second, third = ((version, plan_bytes(version, *self.levels)) for version in (1, 2, 3))
        for round_, key in itertools.product((0, 1), KEYS):
            yield lambda round_=round_, key=key: self.round(key, round_, plan=first)
        for key in KEYS:
            yield lambda key=key: self.round(key, 2, bad={1} if key == 1 else (), plan=second)
        for key in KEYS:
            yield lambda key=key: self.round(key, 3, skipped=True, plan=second)
        for key in (0, 1):
            yield lambda key=key: self.round(key, 4, plan=third)
        yield lambda: self.freeze(2)
        yield lambda: self.view(2, [0, 2], 4, 1)
        for round_, key in itertools.product((4, 5), KEYS):
            yield lambda round_=round_, key=key: self.round(key, round_, slots=(0, 2), plan=third)
        yield lambda: self.freeze(3)
        yield lambda: self.view(3, [0, 2], 6, 2)
        for round_, key in itertools.product((6, 7), KEYS):
            yield lambda round_=round_, key=key: self.round(key, round_, slots=(0, 2), plan=third)

    def play(self):
        """Do every step; after a kill, start again and repeat the step that was under way. Return all answers."""
        answers, lives = [], 1
        for step in self.steps():
            for again in (False, True):
                try:
                    answers.append(step())
                    break
                except Killed:
                    assert not again
                    lives += 1
                    self.kill()
        return answers, lives

    def state(self):
        """Return all that the shard knows, residuals as bytes."""
        records = {
            at: (
                record.residual().tobytes(), record.round, record.epoch, record.plan, record.plan_before, record.bound,
                record.bound_before, record.current, record.current_before, record.before == record.after,
            )
            for at, record in self.shard.records.items()
        }  # fmt: skip
        return records, self.shard.epoch, self.shard.promise, self.shard.members


@pytest.fixture
def undisturbed(codec):
    """Play the script without a kill; return answers and state."""
    job = Job(None, codec)
    answers, lives = job.play()
    assert lives == 1
    return answers, job.state()


@pytest.mark.parametrize("codec", usually(LEVELS, "topk", "random_block"))
def test_a_shard_killed_at_any_point_goes_on_with_the_same_bits(tmp_path, monkeypatch, codec, undisturbed):
    """Before a round is marked, after it, before its result leaves, at promises and views: at each, once."""
    points = []
    monkeypatch.setattr(crashpoints, "reach", points.append)
    counting = Job(None, codec)
    counting.play()
    assert set(points) == {"s.layout", "s.half", "s.marked", "s.frozen", "s.view"}
    for fatal in range(len(points)):
        left = iter(range(len(points) + 10))

        def here(_, left=left, fatal=fatal):
            if next(left) == fatal:
                raise Killed

        monkeypatch.setattr(crashpoints, "reach", here)
        job = Job(tmp_path / str(fatal), codec)
        answers, lives = job.play()
        assert lives == 2
        assert answers == undisturbed[0], points[fatal]
        assert job.state() == undisturbed[1], points[fatal]
        job.kill()
        assert job.state() == undisturbed[1], "what is stored is what is known"
        job.close()


@pytest.mark.parametrize("codec", KEEPING)
def test_a_half_that_was_being_written_does_not_count(tmp_path, monkeypatch, codec, undisturbed):
    """Whatever lies in it: the stored record does not need it."""
    real, calls = folding.fold, []

    def fold(pushes, residual, new_residual, **rest):
        calls.append(new_residual is not None)
        if len(calls) % 3 == 0 and calls[-1]:
            new_residual.fill(np.nan)
            calls.append(False)
            raise Killed
        return real(pushes, residual, new_residual, **rest)

    monkeypatch.setattr(folding, "fold", fold)
    job = Job(tmp_path / "state", codec)
    answers, lives = job.play()
    assert lives > 5
    assert answers == undisturbed[0]
    assert job.state() == undisturbed[1]
    job.close()


@contextlib.contextmanager
def begun(directory):
    job = Job(directory)
    job.view(1, [0, 1, 2], 0, -1)
    job.shard.on_layout(0, job.layout)
    try:
        yield job
    finally:
        job.close()


@pytest.fixture
def job(tmp_path):
    with begun(tmp_path / "state") as job:
        yield job


def test_a_promise_survives():
    """The shard still finishes nothing, and an older view does not free it."""
    with tempfile.TemporaryDirectory() as name, begun(Path(name, "state")) as job:
        for key in KEYS:
            job.round(key, 0)
        promised = job.freeze(3)
        job.kill()
        assert job.shard.promise == 3
        for slot in range(3):
            assert job.shard.on_push(job.members[slot].peer, *job.made(slot, 0, 1, "DATA", False)) == []
        assert job.view(2, [0, 2], 1, 1) == 1
        assert job.freeze(3) == promised
        assert job.view(3, [0, 1, 2], 1, 1) == 3
        assert job.shard.records[0, 0].round == 1, "the pushes that were held count now"


def test_a_round_finished_under_the_last_view_is_not_undone_at_a_start(job):
    """Its cut is for rounds that were finished before it."""
    for key in KEYS:
        job.round(key, 0)
    job.round(1, 1)
    job.freeze(2)
    job.view(2, [0, 1, 2], 1, 1)
    job.round(1, 1)
    job.kill()
    record = job.shard.records[0, 1]
    assert (record.round, record.epoch, record.result.message.epoch) == (1, 2, 2)


def test_the_norm_of_the_residuals_is_known_at_once(job):
    """Before there is another round: whoever reads of a loss reads what was in them."""
    job.round(1, 0)
    _, before = job.shard.norm()
    job.kill()
    assert job.shard.norm()[1] == pytest.approx(before)
    assert before > 0


def test_pushes_of_the_open_round_are_asked_for_again(job):
    """They are not written: a worker keeps them until the round is answered."""
    job.round(0, 0)
    pushed = job.made(0, 0, 1, "DATA", False)
    assert job.shard.on_push(job.members[0].peer, *pushed) == []
    job.kill()
    (send,) = sends(job.shard.on_ask(b"new peer", m.Ask(0, 1, 0, 1, [0, 1])))
    assert (send.peers, send.message) == ((b"new peer",), m.Missing(0, 1, [0]))
    (send,) = sends(job.shard.on_ask(b"new peer", m.Ask(0, 0, 0, 1, [0])))
    assert isinstance(send.message, m.Result), "the result of the finished round is there"


def test_a_layout_comes_back_with_its_digest(job):
    """It is made from the table that is stored."""
    job.kill()
    assert {number: layout.digest for number, layout in job.shard.layouts.items()} == {0: job.layout.digest}
    assert job.shard.on_layout(0, job.layout) == []


def test_another_level_is_refused(tmp_path):
    """Results would have another size than what is reserved: the message says so before anything is touched."""
    first = Job(tmp_path / "state")
    first.shard.on_layout(0, first.layout)
    first.close()
    store = ShardStore.open(tmp_path / "state", shard=0, job="job")
    with pytest.raises(ConfigError, match="the codec's levels have changed"):
        Shard(0, store.boot, settings_of(workers_count=3, codec_light=1.0), store=store)
    store.close()


def test_a_push_larger_than_any_level_of_the_job_is_refused(job):
    """There would be no room for its result."""
    message, frames = job.members[0].data(1, 0, choice=Choice("topk", 1.0))
    (refused,) = notes(job.shard.on_push(b"x", message, frames), "refused")
    assert "give all workers the coordinator's settings" in refused["reason"]


def test_state_is_removed_when_it_is_discarded(tmp_path):
    """Nothing is left of a run that is over, but for what others have put there."""
    job = Job(tmp_path / "state")
    job.shard.on_layout(0, job.layout)
    job.shard.close()
    assert {path.suffix for path in job.directory.iterdir()} == {".state", ".lock"}
    job.store.discard()
    assert list(job.directory.iterdir()) == []
