"""What travels with a shard's results beside gradients: buffers of the lead, and plans."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import BUFFERED, Member, gaussian, plan_bytes, sends
from shards import HALF, HEAVY, LIGHT, SMALL, Job, decoded, refusal, result_of, undo

from ps_accordion.regimes import Choice
from ps_accordion.wire import messages as m

# ---------------------------------------------------------------- buffers


BUFFER = 0
"""A key of the job with buffers."""


@given(st.integers(0, 3), st.data())
def test_the_leads_buffers_come_out_as_they_went_in(lead, data):
    """To the bit, whatever the others do and however often they changed before; nothing of them stays at the shard."""
    job = Job(4, {"codec_light": 0.01}, table=BUFFERED)
    for round_ in range(3):
        values = gaussian(2048, round_) * np.float32(10.0 ** data.draw(st.integers(-30, 30)))
        for slot in range(4):
            kind = data.draw(st.sampled_from(["UNUSED", "JOINED", "EMPTY"]))
            member = job.members[slot]
            pushed = member.data(BUFFER, round_, gradient=values) if slot == lead else member.bare(kind, BUFFER, round_)
            actions = job.push(slot, pushed)
        assert decoded(actions).tobytes() == values.tobytes()
        assert not job.residual(BUFFER).any()


def test_buffers_that_did_not_change_need_no_bytes():
    """The result is UNUSED, and everybody keeps what all agreed on."""
    message, payload = result_of(Job(2, table=BUFFERED).round(BUFFER, 0, ["UNUSED", "UNUSED"]))
    assert (message.kind, message.used, payload) == ("UNUSED", 0, b"")


def test_buffers_are_no_mean():
    """Who would count beside the lead, or pushes rounded values, is refused."""
    job = Job(3, table=BUFFERED)
    members = job.members
    for kind in ("UNUSED", "JOINED"):
        assert f"{kind} has weight 0" in refusal(job, 1, members[1].bare(kind, BUFFER, 0, weight=1.0))
    rounded = members[1].data(BUFFER, 0, choice=Choice("dense", 16.0))
    assert "dense at 32, got dense at 16.0" in refusal(job, 1, rounded)
    job.push(0, members[0].data(BUFFER, 0))
    job.push(1, members[1].data(BUFFER, 0))
    (send,) = sends(job.push(2, members[2].bare("UNUSED", BUFFER, 0)))
    assert isinstance(send.message, m.Refuse)
    assert send.peers == (b"peer 0", b"peer 1", b"peer 2")
    assert "several members pushed buffers" in send.message.reason
    assert job.shard.records[0, BUFFER].round == -1


# ---------------------------------------------------------------- plans


PLANNED = [
    ["SKIP", "DATA"],
    ["UNUSED", "UNUSED"],
    ["EMPTY", "UNUSED"],
    ["EMPTY", "DATA"],
    ["JOINED", "DATA"],
    ["JOINED", "JOINED"],
    ["EMPTY", "JOINED"],
]
"""Rounds that carry a plan: all but those that are the end."""


def test_a_plan_travels_once_and_only_with_key_zero():
    """On the next result of key 0, behind the payload; not again with the round after, and with no other key."""
    job = Job()
    plan = plan_bytes(1, HEAVY)
    job.shard.on_plan(0, 1, plan)
    message, _ = result_of(job.round(HALF, 0, ["DATA", "DATA"]))
    assert message.plan == 0
    actions = job.round(SMALL, 0, ["DATA", "DATA"])
    message, payload = result_of(actions)
    assert message.plan == len(plan)
    assert payload.endswith(plan)
    assert [len(frame) for frame in sends(actions)[0].payload] == [*message.frames, message.plan]
    again = job.push(0, Member(0, job.settings, job.layout).data(SMALL, 0))
    assert result_of(again) == (message, payload)  # who lost the result gets the plan again
    job.shard.on_plan(0, 1, plan)  # the coordinator repeats it until all report it
    assert result_of(job.round(SMALL, 1, ["DATA", "DATA"]))[0].plan == 0


def test_only_a_higher_version_replaces_a_plan():
    """Plans that overtake each other: the newest wins, also over one that has been carried already."""
    job = Job()
    old, new = plan_bytes(2, HEAVY), plan_bytes(3, LIGHT, HEAVY)
    job.shard.on_plan(0, 3, new)
    job.shard.on_plan(0, 2, old)
    assert result_of(job.round(SMALL, 0, ["DATA", "DATA"]))[1].endswith(new)
    job.shard.on_plan(0, 2, old)
    assert result_of(job.round(SMALL, 1, ["DATA", "DATA"]))[0].plan == 0
    assert job.shard.records[0, SMALL].plan == 3


@pytest.mark.parametrize("kinds", PLANNED, ids="-".join)
def test_a_plan_travels_with_any_result_but_the_end(kinds):
    """Also without a payload: a skipped round brings it too, and a JOIN; it is not sent again afterwards."""
    job = Job()
    plan = plan_bytes(1, HEAVY)
    job.shard.on_plan(0, 1, plan)
    message, payload = result_of(job.round(SMALL, 0, kinds))
    assert (message.plan, payload[-len(plan) :]) == (len(plan), plan)
    assert result_of(job.round(SMALL, 1, ["DATA", "DATA"], skipped="SKIP" in kinds))[0].plan == 0


def test_the_end_carries_no_plan():
    """END changes no state, so a plan must not hang on it."""
    job = Job()
    job.shard.on_plan(0, 1, plan_bytes(1, HEAVY))
    message, payload = result_of(job.round(SMALL, 0, ["EMPTY", "EMPTY"]))
    assert (message.kind, message.plan, payload) == ("END", 0, b"")
    assert job.shard.records[0, SMALL].plan == 0


def test_a_view_takes_the_plan_back_with_its_round():
    """The round is finished anew and carries the plan again: else it would be lost for ever."""
    job = Job()
    plan = plan_bytes(1, HEAVY)
    job.shard.on_plan(0, 1, plan)
    job.round(SMALL, 0, ["DATA", "DATA"])
    undo(job, 0, 2)
    assert job.shard.records[0, SMALL].plan == 0
    job.shard.on_plan(0, 2, newer := plan_bytes(2, LIGHT))
    message, payload = result_of(job.round(SMALL, 0, ["DATA", "DATA"]))
    assert payload.endswith(newer)
    assert message.epoch == 2
