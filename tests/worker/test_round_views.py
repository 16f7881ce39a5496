"""A worker's rounds when the view changes: what still counts, what is lost, and what it takes back when it comes in again."""

import numpy as np
import pytest
from machines import Member, layout_of, plan_bytes, sends, settings_of, view_of

from ps_accordion.regimes import Choice
from ps_accordion.wire import messages as m
from ps_accordion.worker.rounds import Decode, Rounds, Standing

NOW = 50.0


class Job:
    """One worker whose view and results the test speaks for; it has pushed all of round 0."""

    def __init__(self, **options) -> None:
        self.settings = settings_of(**options)
        self.layout = layout_of(self.settings)
        self.member = Member(0, self.settings, self.layout)
        self.rounds = Rounds(0, self.layout, self.settings)
        self.rounds.view = view_of(self.settings)
        self.push(0)

    def push(self, round_: int) -> None:
        for key in self.layout.keys:
            message, frames = self.member.data(key.number, round_)
            self.rounds.pushed(message, np.frombuffer(bytes(frames[0]), np.uint8), NOW)

    def result(self, key: int, epoch: int, *, kind: str = "UNUSED", plan: bytes = b"") -> Decode | None:
        message = m.Result(0, key, self.rounds.round, epoch, kind, 0, plan=len(plan))
        return self.rounds.on_result(message, [plan] if plan else [], NOW)

    def view(self, p: int, cut: int, *, slots=(0, 1), removed=(), previous: int = 1) -> None:
        view = view_of(self.settings, p=p, slots=list(slots), cuts=[(0, cut, previous)], removed=list(removed))
        self.rounds.on_view(view, NOW, member=0 in slots)

    def asked(self) -> list[int]:
        """Return the keys that are asked after now."""
        return [key for send in sends(self.rounds.tick(NOW)) for key in send.message.keys]


def test_results_that_a_view_took_back_are_asked_for_again_at_once():
    """They were of the last view and of a round that the new one makes again; those of rounds before the cut stay."""
    job = Job()
    job.result(0, 1)
    job.view(2, 0)
    assert sorted(job.asked()) == [0, 1, 2]
    assert [job.result(key, 1) for key in (0, 1, 2)] == [None] * 3
    assert job.rounds.decide() is None
    for key in (0, 1, 2):
        job.result(key, 2)
    assert job.rounds.decide().kind == "DATA"

    job = Job()
    job.result(0, 1)
    job.view(2, 1)
    assert sorted(job.asked()) == [1, 2]


def test_a_plan_goes_with_the_result_that_carried_it():
    """A view that takes the result back takes the plan back, too: the round made again carries what then holds."""
    job = Job()
    job.result(0, 1, plan=plan_bytes(4, Choice("topk", 0.01)))
    assert job.rounds.plan_version == 0  # it holds when its round is decided, not when it comes
    job.view(2, 0)
    for key in (0, 1, 2):
        job.result(key, 2)
    job.rounds.decide()
    assert job.rounds.plan_version == 0


def test_a_decoding_that_ends_after_its_result_was_taken_back_decides_nothing():
    """The memory holds the old aggregate: the round waits for the new one."""
    job = Job()
    decodes = []
    for key in job.layout.keys:
        message, frames = job.member.data(key.number, 0)
        made = m.Result(0, key.number, 0, 1, "DATA", key.all_used, 0, *[getattr(message, name) for name in CODING])
        decodes.append(job.rounds.on_result(made, [bytes(frame) for frame in frames], NOW))
    job.view(2, 0)
    for decode in decodes:
        job.rounds.decoded(decode)
    assert job.rounds.decide() is None


CODING = ("codec", "level", "elements", "count", "seed", "frames")


def test_who_is_out_sends_nothing_and_loses_its_step():
    """The round ends for it alone, once backward has handed over all of it."""
    job = Job()
    job.view(2, 0, slots=[1])
    assert job.asked() == []
    decision = job.rounds.decide()
    assert (decision.kind, decision.out, decision.round, decision.take_back) == ("SKIP", True, 0, ())
    message, frames = job.member.data(1, 0)
    assert job.rounds.pushed(message, np.frombuffer(bytes(frames[0]), np.uint8), NOW) == []
    assert job.rounds.decide() is None


@pytest.mark.parametrize(("cut", "skipped", "back"), [(0, (), 3), (1, (0,), 3)])
def test_who_comes_back_takes_back_what_was_not_counted(cut, skipped, back):
    """The cut that removed it decides about its open push, and whether the round was skipped."""
    job = Job()
    job.view(2, cut, slots=[1])
    job.rounds.decide()
    job.view(3, 6, removed=[(0, 1, 0, cut)])
    taken = job.rounds.admit(Standing(6, lead=1, skipped=skipped), 9)
    assert len(taken) == back
    assert (job.rounds.round, job.rounds.out, job.rounds.lead) == (6, False, 1)
    assert job.rounds.admit(Standing(6), 9) == ()  # once only


def test_who_comes_back_leaves_alone_what_was_counted():
    """Its open push was in a round before the cut that removed it."""
    job = Job()
    job.view(2, 1, slots=[1])
    job.rounds.decide()
    job.view(3, 6, removed=[(0, 1, 0, 1)])
    assert job.rounds.admit(Standing(6, lead=1), 9) == ()


@pytest.mark.parametrize(("kept", "cut", "back"), [(2, 0, 6), (0, 0, 3), (2, 1, 3), (0, 1, 3)])
def test_who_applied_a_round_that_others_made_again_takes_its_push_back_if_it_is_kept(kept, cut, back):
    """A view went back past it, because a shard's memory was lost. What is not kept is lost, and the worker is told so."""
    job = Job(servers_replay_rounds=kept)
    for key in (0, 1, 2):
        job.result(key, 1)
    job.rounds.decide()
    job.push(1)
    job.view(2, cut, slots=[1])
    job.rounds.decide()
    job.view(3, 6, removed=[(0, 1, 0, cut)])
    taken = job.rounds.admit(Standing(6, lead=1), 9)
    assert sorted(push.round for push, _ in taken) == [0] * (back - 3) + [1] * 3
    assert job.rounds.uncounted == (back == 3 and cut == 0)
    assert job.rounds.admit(Standing(6), 9) == ()


def test_who_comes_in_goes_on_as_the_donor_stands():
    """Round, plan in force, and whether the last round was skipped: its pushes must not contradict the others'."""
    donor, joiner = Job(), Job()
    donor.result(0, 1, plan=plan_bytes(4, Choice("topk", 0.01)))
    donor.result(1, 1, kind="SKIP")
    donor.result(2, 1)
    donor.rounds.decide()
    joiner.view(2, 1)
    joiner.rounds.admit(donor.rounds.standing, 7)
    assert joiner.rounds.round == 1
    assert joiner.rounds.previous_skipped
    assert joiner.rounds.skipped_in_a_row == 1
    assert joiner.rounds.plan == donor.rounds.plan
    assert list(joiner.rounds.skipped) == [0]
