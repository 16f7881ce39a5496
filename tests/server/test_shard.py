"""A shard: whatever order pushes come in, however often, the same bits go out; and nothing that is wrong gets in."""

import itertools
import weakref
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import BOOT, BUFFERED, Member, Pushed, gaussian, layout_of, named, notes, plan_bytes, sends, settings_of, view_of

from ps_accordion.codecs import Coding, get, norm
from ps_accordion.errors import WireError
from ps_accordion.layout import Tensor
from ps_accordion.regimes import Choice
from ps_accordion.server.shard import Shard
from ps_accordion.wire import messages as m

SMALL, HALF, OTHER = 0, 1, 2
"""Keys of the small job: two fused tensors, and the two halves of a large one."""


@dataclass
class Job:
    """A shard that holds every key, and its members."""

    count: int = 2
    options: dict = field(default_factory=dict)
    seen: bool = True
    table: list[Tensor] | None = None

    def __post_init__(self) -> None:
        self.settings = settings_of(workers_count=self.count, **self.options)
        self.layout = layout_of(self.settings, self.table)
        self.members = [Member(slot, self.settings, self.layout) for slot in range(self.count)]
        self.shard = Shard(0, BOOT, self.settings)
        self.shard.on_layout(0, self.layout)
        if self.seen:
            self.shard.on_view(view_of(self.settings))

    def push(self, slot: int, pushed: Pushed) -> list:
        """Hand a push to the shard as its member would."""
        return self.shard.on_push(self.members[slot].peer, *pushed)

    def round(self, key: int, round_: int, kinds: list[str], *, skipped: bool = False, **options) -> list:
        """Push one round of a key, a kind a member; return the actions of the last push."""
        actions = []
        for slot, kind in enumerate(kinds):
            member = self.members[slot]
            pushed = (
                member.data(key, round_, skipped=skipped, **options)
                if kind == "DATA"
                else member.bare(kind, key, round_, skipped=skipped)
            )
            actions = self.push(slot, pushed)
        return actions

    def residual(self, key: int) -> np.ndarray:
        """Return a copy of the residual that the last round of a key left."""
        return self.shard.records[0, key].residual().copy()


def result_of(actions) -> tuple[m.Result, bytes]:
    """Return the one result among the actions, and all its frames in a row."""
    (send,) = sends(actions, m.Result)
    return send.message, b"".join(bytes(frame) for frame in send.payload)


def decoded(actions) -> np.ndarray:
    """Return what a worker makes of the result among the actions."""
    (send,) = sends(actions, m.Result)
    message = send.message
    coding = Coding(message.codec, message.level, message.elements, message.count, message.seed)
    out = np.empty(message.elements, np.float32)
    payload = np.frombuffer(bytes(send.payload[0]), np.uint8)
    get(message.codec).validate(payload, coding)
    get(message.codec).decode(payload, coding, out)
    return out


# ---------------------------------------------------------------- order, repetition, loss


@settings(max_examples=40)
@given(st.integers(1, 4), st.sampled_from(["topk", "random_block", "dense"]), st.data())
def test_the_order_of_arrival_changes_no_bit(count, codec, data):
    """Results and residuals of three keys over three rounds are the same for every order, and with pushes that come twice."""
    levels = {"codec_name": codec} | ({"codec_light": 16.0, "codec_heavy": 16.0} if codec == "dense" else {})
    straight, shuffled = Job(count, levels), Job(count, levels)
    for round_ in range(3):
        pushes = list(itertools.product(range(count), (SMALL, HALF, OTHER)))
        expected, got = {}, {}
        made = {(slot, key): straight.members[slot].data(key, round_) for slot, key in pushes}
        for slot, key in pushes:
            for send in sends(straight.push(slot, made[slot, key])):
                expected[key] = (send.message, [bytes(frame) for frame in send.payload])
        for slot, key in data.draw(st.permutations(pushes + data.draw(st.lists(st.sampled_from(pushes), max_size=4)))):
            for send in sends(shuffled.push(slot, made[slot, key])):
                assert got.setdefault(key, (send.message, [bytes(frame) for frame in send.payload])) == (
                    send.message,
                    [bytes(frame) for frame in send.payload],
                )
        assert got == expected
        assert set(got) == {SMALL, HALF, OTHER}
    for key in (SMALL, HALF, OTHER):
        assert straight.residual(key).tobytes() == shuffled.residual(key).tobytes()


def test_a_round_is_the_mean_of_the_pushes_and_nothing_is_lost():
    """D(result) + residual = mean of D(push) + the residual before, to the last bit that float32 has, over ten rounds."""
    job = Job(3, {"codec_values": "fp32"})
    before = np.zeros(2048, np.float32)
    for round_ in range(10):
        total = np.zeros(2048, np.float64)
        for slot, member in enumerate(job.members):
            message, frames = member.data(HALF, round_)
            out = np.empty(2048, np.float32)
            coding = Coding(message.codec, message.level, message.elements, message.count, message.seed)
            get("topk").decode(np.frombuffer(frames[0], np.uint8), coding, out)
            total += out
            actions = job.push(slot, (message, frames))
        after = job.residual(HALF)
        np.testing.assert_allclose(decoded(actions) + after, total / 3 + before, rtol=1e-5, atol=1e-6)
        assert norm(after) > 0
        before = after


def test_weights_count():
    """A push of weight 3 counts three times one of weight 1, and a member without a gradient still counts in the mean."""
    job = Job(3, {"codec_name": "dense", "codec_light": 32.0, "codec_heavy": 32.0})
    one, other = job.members[0].data(HALF, 0), job.members[1].data(HALF, 0)
    heavy = m.Push(**{name: getattr(one[0], name) for name in one[0].__struct_fields__} | {"weight": 3.0})
    job.push(0, (heavy, one[1]))
    job.push(1, other)
    actions = job.push(2, job.members[2].bare("UNUSED", HALF, 0))
    a, b = (gaussian(2048, slot, HALF, 0) for slot in (0, 1))
    np.testing.assert_allclose(decoded(actions), (3 * a + b) / 5, rtol=1e-6, atol=1e-6)


def test_a_push_that_comes_twice_counts_once():
    """Twice in the open round: nothing happens. After the round: the result again, to whom it came from only."""
    job = Job()
    first = job.members[0].data(HALF, 0)
    assert job.push(0, first) == []
    assert job.push(0, first) == []
    result = result_of(job.push(1, job.members[1].data(HALF, 0)))
    residual = job.residual(HALF)
    again = job.push(0, first)
    assert result_of(again) == result
    assert sends(again)[0].peers == (b"peer 0",)
    assert job.residual(HALF).tobytes() == residual.tobytes()


def test_the_result_goes_where_the_last_repetition_came_from():
    """A member that has connected anew is answered on its new connection."""
    job = Job()
    first = job.members[0].data(HALF, 0)
    job.push(0, first)
    job.shard.on_push(b"new", *first)
    assert sends(job.push(1, job.members[1].data(HALF, 0)))[0].peers == (b"new", b"peer 1")
    job.push(0, job.members[0].data(HALF, 1))
    job.shard.on_ask(b"newer", m.Ask(0, 1, 0, 1, [HALF]))
    assert sends(job.push(1, job.members[1].data(HALF, 1)))[0].peers == (b"newer", b"peer 1")


@pytest.mark.parametrize(("kind", "weight"), [("JOINED", 2.0), ("JOINED", 0.0), ("UNUSED", 2.0), ("UNUSED", 0.0), ("EMPTY", 0.0)])
def test_who_has_no_gradient_counts_as_much_as_it_says(kind, weight):
    """Zeros of that weight in the mean; with weight 0 the others' mean is what it would be without this member."""
    exact = {"codec_name": "dense", "codec_light": 32.0, "codec_heavy": 32.0}
    job = Job(3, exact)
    job.push(0, job.members[0].data(HALF, 0, weight=3.0))
    job.push(1, job.members[1].bare(kind, HALF, 0, weight=weight))
    actions = job.push(2, job.members[2].data(HALF, 0, weight=0.5))
    a, b = (gaussian(2048, slot, HALF, 0) for slot in (0, 2))
    np.testing.assert_allclose(decoded(actions), (3 * a + 0.5 * b) / (3.5 + weight), rtol=1e-6, atol=1e-6)
    if weight == 0.0:
        alone = Job(2, exact)
        alone.push(0, job.members[0].data(HALF, 0, weight=3.0))
        fields = {name: getattr(job.members[2].data(HALF, 0)[0], name) for name in m.Push.__struct_fields__}
        pushed = m.Push(**(fields | {"slot": 1, "incarnation": 2, "weight": 0.5})), job.members[2].data(HALF, 0)[1]
        assert decoded(alone.push(1, pushed)).tobytes() == decoded(actions).tobytes()


@pytest.mark.parametrize("kind", ["SKIP", "UNUSED", "JOINED", "EMPTY"])
def test_the_same_push_with_other_bytes_is_refused(kind):
    """Whether the payload differs, the header, or the kind; the first push stays."""
    job = Job()
    message, frames = job.members[0].data(HALF, 0)
    other = job.members[0].data(HALF, 0, gradient=gaussian(2048, 99))
    job.push(0, (message, frames))
    for changed in (other, job.members[0].bare(kind, HALF, 0), job.members[0].data(HALF, 0, skipped=True)):
        actions = job.push(0, changed)
        assert named(actions) == ["Refuse"]
        assert sends(actions)[0].peers == (b"peer 0",)
        assert "worker 0" in notes(actions, "refused")[0]["culprit"]
        assert "pushed before with other bytes" in sends(actions)[0].message.reason
    clean = Job()
    clean.push(0, (message, frames))
    other = job.members[1].data(HALF, 0)
    assert result_of(job.push(1, other)) == result_of(clean.push(1, other))


def test_stale_and_early_pushes_are_left_alone():
    """Of a finished round, of a round to come, of another incarnation, of a stranger, of a key or layout that is not here."""
    job = Job()
    rounds = [[job.members[slot].data(HALF, round_) for slot in (0, 1)] for round_ in range(3)]
    for pushes in rounds[:2]:
        for slot in (0, 1):
            job.push(slot, pushes[slot])
    before = job.residual(HALF)
    assert job.push(0, rounds[0][0]) == []  # finished, and no longer the last
    late = Member(0, job.settings, job.layout)
    assert job.push(0, late.data(HALF, 3)) == []  # round 2 is open
    stranger = Member(5, job.settings, job.layout)
    assert job.shard.on_push(b"x", *stranger.data(HALF, 2)) == []
    message, frames = rounds[2][0]
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    for changed in ({"incarnation": 9}, {"layout": 1}, {"key": 3}, {"round": -1}):
        assert job.push(0, (m.Push(**(fields | changed)), frames)) == []
    assert job.residual(HALF).tobytes() == before.tobytes()
    assert not job.shard.records[0, HALF].open


def test_nothing_is_finished_before_a_view():
    """Pushes that come before the view or the layout are not kept: their senders ask, and push again."""
    job = Job(seen=False)
    assert [job.push(slot, job.members[slot].data(HALF, 0)) for slot in (0, 1)] == [[], []]
    assert job.shard.on_ask(b"peer 0", m.Ask(0, 0, 0, 1, [HALF])) == []
    job.shard.on_view(view_of(job.settings))
    assert named(job.shard.on_ask(b"peer 0", m.Ask(0, 0, 0, 1, [HALF]))) == ["Missing"]


def test_a_view_that_does_not_name_this_boot_is_not_obeyed():
    """It is meant for another life of this shard; nor is an old view."""
    job = Job(seen=False)
    assert job.shard.on_view(view_of(job.settings, shards=[(0, BOOT + 1, "tcp://x:1")])) == []
    assert (job.shard.epoch, job.shard.members) == (-1, {})
    job.shard.on_view(view_of(job.settings, p=3))
    assert job.shard.on_view(view_of(job.settings, p=2, slots=[0])) == []
    assert (job.shard.epoch, job.shard.members) == (3, {0: 1, 1: 2})


def test_an_ask_is_answered_key_by_key():
    """The result where there is one, which pushes are lacking, and which wait for those of others."""
    job = Job()
    job.round(SMALL, 0, ["DATA", "DATA"])
    job.push(0, job.members[0].data(HALF, 0))
    actions = job.shard.on_ask(b"peer 0", m.Ask(0, 0, 0, 1, [SMALL, HALF, OTHER, 9]))
    assert [type(send.message).__name__ for send in sends(actions)] == ["Result", "Missing"]
    assert result_of(actions)[0].key == SMALL
    assert sends(actions, m.Missing)[0].message == m.Missing(0, 0, [OTHER], [HALF])
    assert all(send.peers == (b"peer 0",) for send in sends(actions))
    for stale in (m.Ask(0, 0, 0, 2, [SMALL]), m.Ask(0, 5, 0, 1, [SMALL]), m.Ask(1, 0, 0, 1, [SMALL]), m.Ask(0, 0, 7, 1, [SMALL])):
        assert job.shard.on_ask(b"peer 0", stale) == []


# ---------------------------------------------------------------- kinds


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


def undo(job: Job, round_: int, p: int) -> None:
    """Take back a round by a view."""
    job.shard.on_view(view_of(job.settings, p=p, cuts=[(0, round_, p - 1)]))


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


LIGHT, HEAVY = Choice("topk", 0.1), Choice("topk", 0.01)
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


# ---------------------------------------------------------------- what is refused


def refusal(job: Job, slot: int, pushed: Pushed) -> str:
    """Return the reason for which a push is refused; it must reach its sender, name it, and leave no trace."""
    actions = job.push(slot, pushed)
    (send,) = sends(actions)
    assert isinstance(send.message, m.Refuse)
    assert send.peers == (job.members[slot].peer,)
    assert (send.message.layout, send.message.key, send.message.round) == (0, pushed[0].key, pushed[0].round)
    assert notes(actions, "refused") == [{"culprit": f"worker {slot}", "reason": send.message.reason}]
    assert f"key {pushed[0].key}, round {pushed[0].round} from worker {slot} is refused" in send.message.reason
    assert not job.shard.records[0, pushed[0].key].open
    return send.message.reason


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


# ---------------------------------------------------------------- sums, slices, switches


def test_a_sum_that_overflows_skips_the_round():
    """Every push is finite, their sum is not: SKIP, and the residual is what it was."""
    job = Job(2, {"codec_name": "dense", "codec_light": 32.0, "codec_heavy": 32.0})
    job.round(HALF, 0, ["DATA", "DATA"])
    before = job.residual(HALF)
    message, payload = result_of(job.round(HALF, 1, ["DATA", "DATA"], gradient=np.full(2048, 3e38, np.float32)))
    assert (message.kind, payload, message.used) == ("SKIP", b"", 1)
    assert job.residual(HALF).tobytes() == before.tobytes()
    fresh = [Member(slot, job.settings, job.layout).data(HALF, 2, skipped=True) for slot in (0, 1)]
    job.push(0, fresh[0])
    assert np.isfinite(decoded(job.push(1, fresh[1]))).all()


@pytest.mark.parametrize("used", [(0b01, 0b01), (0b01, 0b10), (0b00, 0b10), (0b11, 0b10)])
def test_a_slice_that_nobody_used_keeps_its_residual(used):
    """Its place in the result is zero, its residual is untouched to the bit; slices that somebody used are summed as ever."""
    job = Job()
    for round_ in range(3):
        job.round(SMALL, round_, ["DATA", "DATA"])
    before = job.residual(SMALL)
    assert norm(before) > 0
    actions = []
    for slot, bits in enumerate(used):
        member = job.members[slot]
        actions = job.push(slot, member.data(SMALL, 3, used=bits) if bits else member.bare("UNUSED", SMALL, 3))
    message, _ = result_of(actions)
    assert message.used == used[0] | used[1]
    values, after = decoded(actions), job.residual(SMALL)
    for position, part in enumerate(job.layout.keys[SMALL].slices):
        span = slice(part.offset, part.offset + part.length)
        if message.used >> position & 1:
            assert values[span].any()
        else:
            assert not values[span].any()
            assert after[span].tobytes() == before[span].tobytes()


@pytest.mark.parametrize("rule", ["keep", "clip", "reset"])
def test_the_rule_for_switches_holds_when_the_reply_turns_lighter(rule):
    """Once; what it throws away is logged. If that round is skipped, it holds again: the residual is then the old one."""
    job = Job(2, {"codec_residual_at_switch": rule})
    for round_ in range(20):
        job.round(HALF, round_, ["DATA", "DATA"], choice=HEAVY)
    before = job.residual(HALF)
    lost = []
    for round_, skipped in ((20, False), (21, True), (22, False)):
        pushed = [Member(slot, job.settings, job.layout).data(HALF, round_, skipped=skipped, choice=LIGHT) for slot in (0, 1)]
        job.push(0, pushed[0])
        losses = notes(job.push(1, pushed[1]), "loss")
        lost.append(losses[0]["norm"] if losses else 0.0)
        assert all((loss["layout"], loss["key"], loss["round"], loss["why"]) == (0, HALF, round_, "switch") for loss in losses)
    if rule == "keep":
        assert lost == [0.0, 0.0, 0.0]
    else:
        assert 0 < lost[0] <= norm(before) * 1.001
        assert 0 < lost[1] <= norm(before) * 1.001
        assert lost[2] == 0.0
    if rule == "reset":
        assert lost[:2] == [norm(before)] * 2


def test_the_lightest_compression_pushed_is_the_reply():
    """Members may hold different levels and codecs in one round; nobody's precision is lost on the way back."""
    job = Job(3)
    job.push(0, job.members[0].data(HALF, 0, choice=HEAVY))
    job.push(1, job.members[1].data(HALF, 0, choice=LIGHT))
    message, _ = result_of(job.push(2, job.members[2].data(HALF, 0, choice=HEAVY)))
    assert (message.codec, message.level) == LIGHT
    job.push(0, job.members[0].data(HALF, 1, choice=HEAVY))
    job.push(1, job.members[1].data(HALF, 1, choice=LIGHT))
    message, _ = result_of(job.push(2, job.members[2].data(HALF, 1, choice=Choice("dense", 16.0))))
    assert (message.codec, message.level) == ("dense", 16.0)


def test_layouts_do_not_touch_each_other():
    """Two models in one session: key 0 of one is not key 0 of the other."""
    job = Job()
    job.shard.on_layout(1, job.layout)
    second = [Member(slot, job.settings, job.layout, number=1) for slot in (0, 1)]
    job.push(0, job.members[0].data(HALF, 0))
    assert job.push(1, second[1].data(HALF, 0)) == []
    assert result_of(job.push(0, second[0].data(HALF, 0)))[0].layout == 1
    assert job.shard.records[0, HALF].round == -1
    assert result_of(job.push(1, job.members[1].data(HALF, 0)))[0].layout == 0


def test_a_shard_holds_only_its_own_keys():
    """The layout says whose a key is; a push that lost its way is not kept."""
    settings = settings_of(servers_count=3)
    layout = layout_of(settings)
    shards = [Shard(number, BOOT, settings) for number in range(3)]
    for shard in shards:
        shard.on_layout(0, layout)
    assert [sorted(key for _, key in shard.records) for shard in shards] == [
        [key.number for key in layout.keys_of_shard(number)] for number in range(3)
    ]
    assert sorted(key for shard in shards for _, key in shard.records) == [0, 1, 2]


def test_the_memory_of_a_result_stands_until_all_are_two_rounds_further():
    """Workers read it where it lies, and may give the last one to a blank shard; a round that is made again has other memory."""
    taken = []

    def take(nbytes: int) -> np.ndarray:
        taken.append(weakref.ref(block := np.empty(nbytes, np.uint8)))
        return block

    job = Job(options={"codec_name": "dense", "codec_light": 32.0, "codec_heavy": 32.0})
    job.shard = Shard(0, BOOT, job.settings, take=take)
    job.shard.on_layout(0, job.layout)
    job.shard.on_view(view_of(job.settings))

    def held() -> list[bool]:
        return [block() is not None for block in taken]

    job.round(HALF, 0, ["DATA", "DATA"])
    job.round(HALF, 1, ["DATA", "DATA"])
    assert held() == [True, True]
    job.push(0, job.members[0].data(HALF, 2))
    assert held() == [True, True], "one member may yet be in round 1"
    job.push(1, job.members[1].data(HALF, 2))
    assert held() == [False, True, True]
    job.shard.on_view(view_of(job.settings, p=2, cuts=[(0, 2, 1)]))
    job.round(HALF, 2, ["DATA", "DATA"])
    assert held() == [False, True, False, True], "round 1 is still the last one that workers have decided"
    job.round(HALF, 3, ["UNUSED", "UNUSED"])
    job.round(HALF, 4, ["UNUSED", "UNUSED"])
    assert held() == [False, False, False, False]
    assert len(taken) == 4
