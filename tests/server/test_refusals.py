"""What a shard refuses, and to whom it says so: nothing that is wrong gets in."""

import numpy as np
import pytest
from machines import Member, Pushed, named, sends
from shards import HALF, Job, decoded, refusal, result_of

from ps_accordion.errors import WireError
from ps_accordion.wire import messages as m


def changed(pushed: Pushed, **fields) -> Pushed:
    message, frames = pushed
    return m.Push(**({name: getattr(message, name) for name in message.__struct_fields__} | fields)), frames


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"elements": 2047}, "expected 2048 elements, the header says 2047"),
        ({"elements": 0}, "expected 2048 elements"),
        ({"count": 204}, "204 entries"),
        ({"count": 2049}, "2049 entries"),
        ({"frames": []}, "expected payload frames of"),
        ({"frames": [10, 10]}, "expected payload frames of"),
        ({"codec": "zip"}, "'zip'"),
        ({"codec": ""}, "''"),
        ({"codec": "dense", "level": 32.0}, "dense"),
        ({"codec": "random_block"}, "random_block"),
        ({"level": 0.0}, "0.0"),
        ({"level": 2.0}, "2.0"),
        ({"level": float("nan")}, "nan"),
        ({"level": 0.01}, "at most"),
        ({"used": 0}, "used bits"),
        ({"used": 2}, "used bits 0b10 for a key of 1 slices"),
        ({"weight": 0.0}, "weight"),
        ({"kind": "SKIP"}, "no payload"),
        ({"kind": "EMPTY"}, "no payload"),
        ({"kind": "UNUSED"}, "no payload"),
        ({"kind": "JOINED"}, "no payload"),
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_is_refused(fields, says):
    """With what was expected, what came, and who sent it."""
    job = Job()
    assert says in refusal(job, 1, changed(job.members[1].data(HALF, 0), **fields))


def test_an_empty_push_counts_for_nothing():
    """A finished worker with a weight would shrink everybody's mean."""
    job = Job()
    assert "EMPTY has weight 0, got 1.0" in refusal(job, 0, changed(job.members[0].bare("EMPTY", HALF, 0), weight=1.0))
    for kind in ("UNUSED", "JOINED"):
        assert "no used bits" in refusal(job, 0, changed(job.members[0].bare(kind, HALF, 0), used=1))


def test_damaged_payloads_are_refused_or_harmless():
    """Any byte of a payload may be anything: either it is refused, or it decodes to finite numbers and the round goes on."""
    message, frames = Job().members[0].data(HALF, 0)
    draw = np.random.default_rng(5)
    refused = 0
    for _ in range(150):
        job = Job()
        damaged = bytearray(frames[0])
        damaged[draw.integers(len(damaged))] ^= 1 << draw.integers(8)
        actions = job.push(0, (message, (memoryview(damaged),)))
        if actions:
            assert named(actions) == ["Refuse"]
            refused += 1
        else:
            assert np.isfinite(decoded(job.push(1, job.members[1].data(HALF, 0)))).all()
    assert refused > 10


@pytest.mark.parametrize(("codec", "level"), [("dense", 32.0), ("bf16", 16.0)])
@pytest.mark.parametrize("culprits", [[0], [1], [0, 1]])
def test_payloads_that_are_not_finite_are_refused_when_they_are_added(codec, level, culprits):
    """Who sent them is named, nothing comes of the round, and it goes on when they have pushed again."""
    job = Job(options={"codec_name": codec, "codec_light": level, "codec_heavy": level})
    before = job.round(HALF, 0, ["DATA", "DATA"])
    actions = []
    for slot, member in enumerate(job.members):
        message, (frame,) = member.data(HALF, 1)
        damaged = bytearray(frame)
        if slot in culprits:
            damaged[-2:] = b"\x80\x7f"  # infinity, or its upper half
        actions += job.push(slot, (message, (memoryview(damaged),)))
    assert [(send.peers, type(send.message)) for send in sends(actions)] == [
        ((job.members[slot].peer,), m.Refuse) for slot in culprits
    ]
    assert all(
        "finite" in send.message.reason and f"worker {slot}" in send.message.reason
        for send, slot in zip(sends(actions), culprits, strict=True)
    )
    again = [job.push(slot, job.members[slot].data(HALF, 1)) for slot in culprits]
    assert result_of(again[-1])[0].round == 1
    assert np.isfinite(decoded(again[-1])).all()
    assert result_of(before)[0].round == 0


class Lent:
    """What a worker lends: it stands, it has been written over, or it is something else."""

    def __init__(self, says: bool | None) -> None:
        self.says = says

    def verified(self) -> bool:
        if self.says is None:
            raise WireError("checksum of what lies there")
        return self.says


def test_a_push_in_the_memory_of_its_worker_is_verified_before_it_is_held():
    """One that has been written over is lost, and one that is not what was lent is refused."""
    job = Job(options={"codec_name": "dense", "codec_light": 32.0, "codec_heavy": 32.0})
    pushed, peer = job.members[0].data(HALF, 0), job.members[0].peer
    assert job.shard.on_push(peer, *pushed, Lent(False)) == []
    assert job.shard.records[0, HALF].open == {}
    (refuse,) = sends(job.shard.on_push(peer, *pushed, Lent(None)))
    assert "checksum of what lies there" in refuse.message.reason
    assert job.shard.on_push(peer, *pushed, Lent(True)) == []
    assert list(job.shard.records[0, HALF].open) == [0]


@pytest.mark.parametrize("cut", [-1, 1, 4])
def test_a_payload_of_another_length_is_refused(cut):
    """Shorter or longer, though the header agrees with it."""
    job = Job()
    message, frames = job.members[0].data(HALF, 0)
    payload = bytes(frames[0])[:cut] if cut < 0 else bytes(frames[0]) + bytes(cut)
    refusal(job, 0, (changed((message, frames), frames=[len(payload)])[0], (memoryview(payload),)))


def test_a_refused_member_may_push_again():
    """A refusal leaves no trace, so the right push still finishes the round."""
    job = Job()
    good = job.members[0].data(HALF, 0)
    refusal(job, 0, changed(good, count=3))
    job.push(0, good)
    assert result_of(job.push(1, job.members[1].data(HALF, 0)))[0].kind == "DATA"


def disagreement(job: Job) -> list:
    job.push(0, job.members[0].data(HALF, 0))
    return job.push(1, job.members[1].data(HALF, 0, skipped=True))


def test_members_that_disagree_whether_a_round_was_skipped_are_told():
    """Somebody has applied what others have not: there is no right sum, so all are refused."""
    job = Job()
    (send,) = sends(disagreement(job))
    assert send.peers == (b"peer 0", b"peer 1")
    assert "disagree whether round -1 was skipped" in send.message.reason
    assert job.shard.records[0, HALF].round == -1


def test_unequal_seeds_of_a_shared_block_are_told():
    """Blocks of different places cannot be added: the message says that job seeds or plans differ."""
    job = Job(2, {"codec_name": "random_block"})
    message, frames = job.members[1].data(HALF, 0)
    job.push(0, job.members[0].data(HALF, 0))
    (send,) = sends(job.push(1, changed((message, frames), seed=message.seed ^ 1)))
    assert send.peers == (b"peer 0", b"peer 1")
    assert "members drew different positions" in send.message.reason


def test_a_lost_refusal_of_all_is_said_again():
    """A round that cannot be finished must not become a wait without end: who pushes or asks again is told again."""
    job = Job()
    disagreement(job)
    for actions in (
        job.shard.on_ask(b"peer 0", m.Ask(0, 0, 0, 1, [HALF])),
        job.shard.on_push(b"peer 0", *Member(0, job.settings, job.layout).data(HALF, 0)),
    ):
        assert named(actions) == ["Refuse"]
        assert b"peer 0" in sends(actions)[0].peers
