"""What a round of a shard comes to, whatever its members push: a mean, nothing, a skip, a join or the end."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import Member, sends, view_of
from shards import HALF, Job, result_of, undo

from ps_accordion.wire import messages as m


def expected_kind(kinds) -> str:
    """Rule 3, written down once more."""
    if "SKIP" in kinds:
        return "SKIP"
    if set(kinds) == {"EMPTY"}:
        return "END"
    if set(kinds) <= {"JOINED", "EMPTY"}:
        return "JOIN"
    return "DATA" if "DATA" in kinds else "UNUSED"


def expected_lead(kinds) -> int:
    """Return the lowest slot that trains; after a round in which all did, the lowest that waits; else the lowest of all."""
    for slot, kind in enumerate(kinds):
        if kind not in ("JOINED", "EMPTY"):
            return slot
    return kinds.index("JOINED") if "JOINED" in kinds else 0


KINDS = ["DATA", "UNUSED", "SKIP", "JOINED", "EMPTY"]


@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, repeat=3)), ids="-".join)
def test_what_a_round_comes_to(kinds):
    """Any SKIP, else all have finished, else all wait, else no DATA, else a sum; only a sum writes a residual."""
    job = Job(3)
    job.round(HALF, 0, ["DATA"] * 3)
    before = job.residual(HALF)
    actions = job.round(HALF, 1, list(kinds))
    message, payload = result_of(actions)
    assert (message.kind, message.lead) == (expected_kind(kinds), expected_lead(kinds))
    assert sends(actions)[0].peers == (b"peer 0", b"peer 1", b"peer 2")
    assert message.used == ("DATA" in kinds)
    record = job.shard.records[0, HALF]
    if message.kind != "DATA":
        assert (payload, message.codec, message.frames) == (b"", "", [])
        assert job.residual(HALF).tobytes() == before.tobytes()
        assert record.before == record.after == 1
    else:
        assert (record.before, record.after) == (1, 0)


@pytest.mark.parametrize("wrote", ["SKIP", "DATA", "UNUSED"])
def test_the_round_after_a_skipped_one_starts_where_that_one_started(wrote):
    """Whether this key wrote a half in the skipped round (the skip was elsewhere) or not: as if the round had not been."""
    job, clean = Job(), Job()
    pushes = [[job.members[slot].data(HALF, round_) for slot in (0, 1)] for round_ in (0, 1)]
    for round_, slot in itertools.product((0, 1), (0, 1)):
        job.push(slot, pushes[round_][slot])
        clean.push(slot, pushes[round_][slot])
    before = job.residual(HALF)
    job.round(HALF, 2, [wrote, wrote])
    clean.round(HALF, 2, ["SKIP", "SKIP"])
    assert (job.residual(HALF).tobytes() != before.tobytes()) == (wrote == "DATA")
    for round_, skipped in ((3, True), (4, False), (5, False)):
        # The same pushes to both, so that only the shards can differ.
        pushed = [Member(slot, job.settings, job.layout).data(HALF, round_, skipped=skipped) for slot in (0, 1)]
        job.push(0, pushed[0])
        clean.push(0, pushed[0])
        assert result_of(job.push(1, pushed[1])) == result_of(clean.push(1, pushed[1]))
        assert job.residual(HALF).tobytes() == clean.residual(HALF).tobytes()


def test_many_skipped_rounds_in_a_row_start_from_the_same_half():
    """Each writes and is thrown away; the first that counts starts from what was there before them all."""
    job, clean = Job(), Job()
    for each in (job, clean):
        each.round(HALF, 0, ["DATA", "DATA"])
    for round_ in range(1, 6):
        job.round(HALF, round_, ["DATA", "DATA"], skipped=round_ > 1)
        clean.round(HALF, round_, ["SKIP", "SKIP"], skipped=round_ > 1)
    pushed = [Member(slot, job.settings, job.layout).data(HALF, 6, skipped=True) for slot in (0, 1)]
    for each in (job, clean):
        each.push(0, pushed[0])
    assert result_of(job.push(1, pushed[1])) == result_of(clean.push(1, pushed[1]))


@pytest.mark.parametrize("steps", list(itertools.product(["undo", "skip", "join", "keep"], repeat=4)), ids="-".join)
def test_undone_skipped_and_joining_rounds_leave_no_trace(steps):
    """Undone then skipped, skipped then joined, joined and undone: the residual is always that of the rounds that count.

    `protocol.md` 5.1: with one undo half, going back one half too many is the easy mistake. Payloads are sparse enough to fold
    only what has changed since, of which the clean run knows more.
    """
    job, clean = Job(options={"codec_light": 0.03}), Job(options={"codec_light": 0.03})
    for each in (job, clean):
        each.round(HALF, 0, ["DATA", "DATA"])
    round_, skipped, p, counted = 1, False, 1, 1
    for step in (*steps, "keep"):
        pushed = [Member(slot, job.settings, job.layout).data(HALF, round_, skipped=skipped) for slot in (0, 1)]
        if step == "join":
            for _ in range(2):
                message, _ = result_of(job.round(HALF, round_, ["JOINED", "JOINED"], skipped=skipped))
                assert (message.kind, message.lead) == ("JOIN", 0)
                p += 1
                undo(job, round_, p)
            job.round(HALF, round_, ["JOINED", "JOINED"], skipped=skipped)
        else:
            job.push(0, pushed[0])
            job.push(1, pushed[1])
        if step == "undo":
            p += 1
            undo(job, round_, p)
            continue
        if step == "keep":
            # The same payloads, numbered as if the other rounds had not been.
            for slot in (0, 1):
                fields = {name: getattr(pushed[slot][0], name) for name in pushed[slot][0].__struct_fields__}
                clean.push(slot, (m.Push(**(fields | {"round": counted, "previous_skipped": False})), pushed[slot][1]))
            counted += 1
            assert job.residual(HALF).tobytes() == clean.residual(HALF).tobytes()
        skipped = step == "skip"
        round_ += 1


def test_a_view_takes_back_the_last_round_and_lets_the_rest_finish_the_next():
    """Who is out no longer holds up a round: with its push gone from the open round, the others' sum is the result."""
    job = Job(3)
    job.round(HALF, 0, ["DATA"] * 3)
    job.push(0, job.members[0].data(HALF, 1))
    job.push(2, job.members[2].data(HALF, 1))
    assert job.shard.records[0, HALF].round == 0
    actions = job.shard.on_view(view_of(job.settings, p=2, slots=[0, 2], cuts=[(0, 1, 1)]))
    message, _ = result_of(actions)
    assert (message.round, message.epoch, message.kind) == (1, 2, "DATA")
    assert sends(actions)[0].peers == (b"peer 0", b"peer 2")


# ---------------------------------------------------------------- the end of everybody's data


@settings(max_examples=60)
@given(st.integers(1, 4), st.data())
def test_the_lead_of_a_join_has_the_last_state_and_goes_on(count, data):
    """Whoever runs out of data when: who waits may fetch from the lead of the JOIN what the last step of all made.

    Unless only workers that left their session made that step: then the lead is one of them, which everybody can see. The same
    when a view takes the round back and it is finished anew.
    """
    job = Job(count)
    job.shard.on_layout(0, job.layout)
    state = [0] * count  # the round whose step each worker's parameters come from
    kinds = ["DATA"] * count
    p = 1
    for round_ in range(1, 12):
        for slot, kind in enumerate(kinds):
            if kind == "DATA":  # only who trained can run out of data
                kinds[slot] = data.draw(st.sampled_from(["DATA", "DATA", "UNUSED", "JOINED", "EMPTY"]))
        message, _ = result_of(job.round(HALF, round_ - 1, kinds))
        if data.draw(st.booleans()):
            p += 1
            undo(job, round_ - 1, p)
            again, _ = result_of(job.round(HALF, round_ - 1, kinds))
            assert (again.kind, again.lead) == (message.kind, message.lead)
        training = [slot for slot, kind in enumerate(kinds) if kind in ("DATA", "UNUSED")]
        if message.kind == "END":
            return
        if training:
            assert len({state[slot] for slot in training}) == 1
            assert message.lead == training[0]
            for slot in training:
                state[slot] = round_
        else:
            waiting = [slot for slot, kind in enumerate(kinds) if kind == "JOINED"]
            able = [slot for slot in waiting if state[slot] == max(state)]
            assert message.kind == "JOIN"
            assert state[message.lead] == max(state)
            if not able:
                assert kinds[message.lead] == "EMPTY"
                return
            assert message.lead == able[0]
            for slot in waiting:
                state[slot] = max(state)
        kinds = ["EMPTY" if kind == "EMPTY" else "JOINED" if training and kind == "JOINED" else "DATA" for kind in kinds]


def test_a_join_that_a_view_took_back_keeps_its_lead():
    """The result that named the last lead is gone, and who had trained is still known."""
    job = Job(3)
    job.round(HALF, 0, ["DATA", "DATA", "DATA"])
    job.round(HALF, 1, ["JOINED", "JOINED", "DATA"])
    for p in (2, 3):
        message, _ = result_of(job.round(HALF, 2, ["JOINED"] * 3))
        assert (message.kind, message.lead) == ("JOIN", 2)
        undo(job, 2, p)
    job.round(HALF, 2, ["JOINED", "DATA", "JOINED"])
    assert result_of(job.round(HALF, 3, ["JOINED"] * 3))[0].lead == 1


def test_a_lead_that_a_view_removed_leads_no_more():
    """Somebody who is there has to: the lowest that waits."""
    job = Job(3)
    job.round(HALF, 0, ["JOINED", "JOINED", "DATA"])
    for slot in (0, 1):
        job.push(slot, job.members[slot].bare("JOINED", HALF, 1))
    message, _ = result_of(job.shard.on_view(view_of(job.settings, p=2, slots=[0, 1], cuts=[(0, 1, 1)])))
    assert (message.kind, message.lead) == ("JOIN", 0)


def test_some_have_finished_while_others_wait_again_and_again():
    """EMPTY beside JOINED is a JOIN every time, EMPTY beside data an ordinary round, and the last EMPTY makes the END."""
    job = Job(3)
    told = []
    for round_, kinds in enumerate(
        (
            ["DATA", "EMPTY", "DATA"],
            ["JOINED", "EMPTY", "DATA"],
            ["JOINED", "EMPTY", "JOINED"],
            ["JOINED", "EMPTY", "JOINED"],
            ["DATA", "EMPTY", "UNUSED"],
            ["EMPTY", "EMPTY", "JOINED"],
            ["EMPTY", "EMPTY", "UNUSED"],
            ["EMPTY", "EMPTY", "EMPTY"],
        )
    ):
        message, _ = result_of(job.round(HALF, round_, kinds))
        told.append((message.kind, message.lead))
    assert told[:5] == [("DATA", 0), ("DATA", 2), ("JOIN", 2), ("JOIN", 0), ("DATA", 0)]
    assert told[5:] == [("JOIN", 2), ("UNUSED", 2), ("END", 2)]
