"""A shard and a worker that leaves: what it hands over counts once beside the others' pushes, and asks nobody for more bytes."""

import numpy as np
import pytest
from machines import BUFFERED, gaussian
from shards import HALF, Job, decoded, result_of

from ps_accordion.codecs import Coding, get
from ps_accordion.regimes import Choice
from ps_accordion.wire import messages as m


def flush(job, slot, key, round_, *, skipped=False, weight=1.0):
    """Return the push with which a member hands its residual over."""
    pushed = job.members[slot].coders[key].flush(round_=round_, previous_skipped=skipped, weight=weight)
    return pushed.message, (pushed.payload.data,) if pushed.payload is not None else ()


def started(count=2, **options):
    """Return a shard after one round, with residuals on both sides."""
    job = Job(count, options=options)
    job.round(HALF, 0, ["DATA"] * count)
    return job


def test_a_residual_is_summed_beside_compressed_pushes_and_the_reply_stays_compressed():
    """The mean takes it with its member's weight; the result is of the level that the others pushed."""
    job = started()
    mine, theirs = job.members[0].coders[HALF].host_residual(), job.residual(HALF)
    pushed = job.members[1].data(HALF, 1)
    other = np.empty(job.layout.keys[HALF].elements, np.float32)
    coding = pushed[0].codec, pushed[0].level, pushed[0].elements, pushed[0].count, pushed[0].seed
    get("topk").decode(np.frombuffer(bytes(pushed[1][0]), np.uint8), Coding(*coding), other)
    job.push(1, pushed)
    actions = job.push(0, flush(job, 0, HALF, 1))
    message, _ = result_of(actions)
    assert (message.kind, message.codec, message.level, message.lead) == ("DATA", "topk", 0.1, 1)
    expected = (mine + other) * np.float32(0.5) + theirs
    assert np.array_equal(decoded(actions) + job.residual(HALF), expected)


def test_a_shard_that_takes_over_a_large_residual_says_how_much_it_has_now():
    """At once, also in a round in which it would not have looked: whoever reads of its loss reads that norm."""
    job = started()
    job.members[0].coders[HALF].set_residual(gaussian(job.layout.keys[HALF].elements, 1) * np.float32(1000))
    job.push(0, flush(job, 0, HALF, 1))
    job.push(1, job.members[1].data(HALF, 1))
    assert job.shard.norm() == pytest.approx((1, np.linalg.norm(job.residual(HALF))))


def test_where_nobody_trains_it_stays_in_the_residual_of_the_shard():
    """Nobody could apply it: no result, no JOIN and no END, and the next round goes on from it. A skip takes it back."""
    job = started()
    mine, theirs = job.members[0].coders[HALF].host_residual(), job.residual(HALF)
    for kind in ("UNUSED", "JOINED", "EMPTY"):
        job = started()
        job.push(1, job.members[1].bare(kind, HALF, 1, weight=0.0 if kind == "EMPTY" else 1.0))
        message, payload = result_of(job.push(0, flush(job, 0, HALF, 1)))
        assert (message.kind, payload) == ("UNUSED", b"")
        scale = np.float32(1.0 if kind == "EMPTY" else 0.5)
        assert np.array_equal(job.residual(HALF), mine * scale + theirs)
        job.push(0, job.members[0].data(HALF, 2, skipped=True))
        job.push(1, job.members[1].bare("UNUSED", HALF, 2, skipped=True))
        assert job.shard.records[0, HALF].before == 1  # from what round 0 left


def test_a_leaver_without_a_residual_waits_for_nobody():
    """It has nothing to bring, and its weight counts as that of one without a gradient."""
    job = Job(2, options={"codec_name": "dense", "codec_light": 32, "codec_heavy": 16})
    job.round(HALF, 0, ["DATA", "DATA"])
    job.push(1, job.members[1].data(HALF, 1))
    message, _ = result_of(job.push(0, flush(job, 0, HALF, 1)))
    assert (message.kind, message.lead) == ("DATA", 1)
    job.push(1, job.members[1].bare("JOINED", HALF, 2))
    message, _ = result_of(job.push(0, flush(job, 0, HALF, 2)))
    assert (message.kind, message.lead) == ("UNUSED", 1)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"codec": "dense", "level": 16.0}, "handed over as dense at 32, got dense at 16.0"),
        ({"weight": 0.0}, "FLUSH needs used bits and a weight"),
        ({"elements": 7}, "expected 1024 elements"),
        ({"used": 0}, "FLUSH has no payload and no used bits"),
    ],
)
def test_a_residual_that_is_wrong_is_refused(fields, why):
    """As any push is."""
    job = started()
    message, frames = flush(job, 0, HALF, 1)
    changed = m.Push(**({name: getattr(message, name) for name in message.__struct_fields__} | fields))
    (send,) = [each for each in job.push(0, (changed, frames)) if hasattr(each, "message")]
    assert isinstance(send.message, m.Refuse)
    assert why in send.message.reason or "elements" in why


def test_nobody_hands_over_buffers():
    """They are one worker's, and not a sum."""
    job = Job(2, table=BUFFERED)
    job.members[0].data(0, 0, choice=Choice("dense", 32.0))
    push = m.Push(0, 0, 0, 0, 1, "FLUSH", 1.0, 0, False)
    (_, send) = job.push(0, (push, ()))
    assert "FLUSH has weight 0 there" in send.message.reason
    assert not job.push(0, job.members[0].bare("FLUSH", 0, 0))
