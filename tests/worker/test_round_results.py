"""A worker's rounds and what a network may do: results that do not fit, come late, come twice, or are overwritten meanwhile."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import BOOT, Member, layout_of, plan_bytes, sends, settings_of, view_of
from rounds import HEAVY, KEYS, NOW, Job, changed, received, take_in

from ps_accordion.errors import WireError
from ps_accordion.server.shard import Shard
from ps_accordion.wire import messages as m
from ps_accordion.worker.rounds import Rounds

# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    "fields",
    [
        {"elements": 2047},
        {"elements": 1 << 31},
        {"used": 2},
        {"count": 3},
        {"count": 1 << 31},
        {"frames": [1]},
        {"frames": []},
        {"codec": "zip"},
        {"codec": "dense"},
        {"level": 0.0},
        {"level": 1e300},
        {"level": float("nan")},
    ],
    ids=str,
)
def test_a_result_that_does_not_fit_is_an_error(fields):
    """Sizes come from the layout: nothing is decoded that disagrees with it."""
    job = Job()
    with pytest.raises(WireError):
        received(job.rounds.on_result(*changed(job.push()[1], **fields), NOW))


@given(st.integers(0, 1 << 14), st.integers(1, 255))
def test_a_damaged_payload_is_an_error_or_safe(position, flip):
    """The checksum has been passed by then; a server that goes wrong must still not make a worker read wild memory."""
    job = Job()
    message, (frame,) = job.push()[1]
    damaged = bytearray(frame)
    damaged[position % len(damaged)] ^= flip
    try:
        decode = job.rounds.on_result(message, [bytes(damaged)], NOW)
        received(decode)
    except WireError:
        return
    assert decode.payload.nbytes == len(frame)


# ---------------------------------------------------------------- all together, over a bad network


class World:
    """Workers and shards with a network between them that loses, doubles and reorders, and a clock."""

    STEPS = ((4, 3, 2), (1, 3, 0))
    """Steps that each worker has data for, before the first join and before the second; then all finish, worker 2 at once."""

    def __init__(self, seed: int, *, loss: float, double: float, **options) -> None:
        self.settings = settings_of(workers_count=3, servers_count=2, timeouts_resend=0.2, **options)
        self.layout = layout_of(self.settings)
        self.draw = random.Random(seed)
        self.loss, self.double = loss, double
        self.shards = [Shard(number, BOOT, self.settings) for number in range(2)]
        view = view_of(self.settings)
        for shard in self.shards:
            shard.on_layout(0, self.layout)
            shard.on_view(view)
            shard.on_plan(0, 1, plan_bytes(1, HEAVY))
        self.members = [Member(slot, self.settings, self.layout) for slot in range(3)]
        self.rounds = [Rounds(0, self.layout, self.settings) for _ in range(3)]
        for rounds in self.rounds:
            rounds.view = view
        self.pushed = [-1, -1, -1]
        self.joins, self.steps = [0, 0, 0], [0, 0, 0]
        self.log: list[list] = [[], [], []]
        self.now = 0.0
        self.flying: list[tuple] = []

    def send(self, source: int | None, actions) -> None:
        """Give messages to the network."""
        for each in sends(actions):
            for peer in each.peers:
                frames = [bytes(frame) for frame in each.payload]
                copies = (self.draw.random() >= self.loss) + (self.draw.random() < self.double)
                self.flying += [(source, peer, each.message, frames)] * copies

    def push_round(self, slot: int) -> None:
        """Push every key of a worker's round: some of it not used, some not finite, and nothing when it has no data."""
        rounds, member = self.rounds[slot], self.members[slot]
        self.pushed[slot] = round_ = rounds.round
        join = self.joins[slot]
        finished = join == len(self.STEPS) or (slot == 2 and join == 1)
        waits = not finished and self.steps[slot] >= self.STEPS[join][slot]
        self.steps[slot] += 1
        for key in self.layout.keys:
            if finished or waits:
                kind = "EMPTY" if finished else "JOINED"
            elif (slot + key.number + round_) % 5 == 0:
                kind = "UNUSED"
            else:
                kind = "SKIP" if (slot, round_, key.number) in ((1, 2, 1), (0, 3, 1)) else "DATA"
            if kind == "DATA":
                message, frames = member.data(key.number, round_, skipped=rounds.previous_skipped, choice=rounds.choice(key))
            else:
                weight = 0.0 if slot == 0 else 2.5  # what a missing gradient counts for is up to the worker
                message, frames = member.bare(kind, key.number, round_, skipped=rounds.previous_skipped, weight=weight)
            payload = np.frombuffer(frames[0], np.uint8) if frames else None
            self.send(slot, rounds.pushed(message, payload, self.now))

    def deliver(self) -> None:
        """Hand over one message, any of those that fly."""
        source, peer, message, frames = self.flying.pop(self.draw.randrange(len(self.flying)))
        if source is not None:
            shard, back = self.shards[int(peer.split()[1])], b"%d" % source
            self.send(None, shard.on_push(back, message, frames) if isinstance(message, m.Push) else shard.on_ask(back, message))
            return
        slot = int(peer)
        if isinstance(message, m.Missing):
            self.send(slot, self.rounds[slot].on_missing(message, self.now))
            return
        assert isinstance(message, m.Result)
        rounds = self.rounds[slot]
        if not rounds.ended and message.round == rounds.round:
            take_in(rounds, message, frames, self.now)
            results = dict(rounds._results)
            decision = rounds.decide()
            if decision is not None:
                entry = [(key, results[key].kind, results[key].used, results[key].count) for key in sorted(results)]
                self.log[slot].append((decision.round, decision.kind, decision.used, entry, rounds.lead, rounds.plan_version))
                if decision.kind == "JOIN":
                    self.joins[slot], self.steps[slot] = self.joins[slot] + 1, 0
                for push, payload in decision.take_back:
                    self.members[slot].coders[push.key].take_back(push, payload)

    def play(self) -> "World":
        """Play until every worker has seen the end."""
        while not all(rounds.ended for rounds in self.rounds):
            assert self.now < 600, "it hangs"
            for slot, rounds in enumerate(self.rounds):
                if not rounds.ended and self.pushed[slot] < rounds.round:
                    self.push_round(slot)
                if not rounds.ended:
                    self.send(slot, rounds.tick(self.now))
            for _ in range(self.draw.randrange(6)):
                if self.flying:
                    self.deliver()
            self.now += 0.02
        return self

    def bits(self) -> list[bytes]:
        """Return every residual, at the workers and at the shards."""
        mine = [coder.residual.tobytes() for member in self.members for coder in member.coders if coder.residual is not None]
        return mine + [record.residual().tobytes() for shard in self.shards for _, record in sorted(shard.records.items())]


@pytest.mark.parametrize("codec", ["topk", "random_block"])
def test_a_bad_network_changes_no_bit(codec):
    """A fifth lost, a tenth doubled, all reordered; with skips, unused keys, a plan, joins, and a worker that finishes early.

    Every worker decides the same rounds in the same way, nobody hangs, and every residual has the same bits in the end.
    """
    clean = World(0, loss=0.0, double=0.0, codec_name=codec).play()
    assert clean.log[0] == clean.log[1] == clean.log[2]
    kinds = [kind for _, kind, *_ in clean.log[0]]
    assert kinds == ["DATA", "DATA", "SKIP", "SKIP", "JOIN", "DATA", "DATA", "DATA", "JOIN", "END"]
    assert [lead for *_, lead, _ in clean.log[0]] == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert clean.log[0][-1][-1] == 1  # the plan has arrived
    for seed in range(8):
        bad = World(seed, loss=0.2, double=0.1, codec_name=codec).play()
        assert bad.log == clean.log
        assert bad.bits() == clean.bits()


class Lent:
    """What lies in the memory of a server that may write over it."""

    stands = True


def test_what_was_overwritten_while_it_was_decoded_counts_as_lost():
    """The result is asked for again, and no blank shard gets what is left of it."""
    job, loan = Job(), Lent()
    results = job.push()
    for key in KEYS:
        decode = job.rounds.on_result(*results[key], NOW, loan if key == 1 else None)
        loan.stands = key != 1
        job.rounds.decoded(decode, stands=decode.stands)
    assert job.rounds.decide() is None
    assert 1 not in job.rounds._results
    (ask,) = sends(job.rounds.tick(NOW + 100), m.Ask)
    assert ask.message.keys == [1]
    take_in(job.rounds, *results[1])
    assert job.rounds.decide().kind == "DATA"


def test_results_that_no_longer_stand_are_given_to_nobody():
    """A blank shard would go on after something else."""
    job, loan = Job(), Lent()
    results = job.push()
    for key in KEYS:
        job.rounds.decoded(job.rounds.on_result(*results[key], NOW, loan if key == 1 else None))
    job.rounds.decide()
    view = view_of(job.settings, p=2, cuts=[(0, 1, 1)], restore=[(0, BOOT)])

    def restored() -> list[int]:
        given = job.rounds.retained.restores(view, 1, 0, who=(0, 1), server_of={0: "server 0"})
        return [send.message.result.key for send in given]

    assert restored() == [0, 1, 2]
    loan.stands = False
    assert restored() == [0, 2]
