"""A shard: whatever order pushes come in, however often, the same bits go out, and nothing gets lost."""

import itertools
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import BOOT, Member, gaussian, layout_of, named, notes, sends, settings_of, view_of
from shards import HALF, HEAVY, LIGHT, OTHER, SMALL, Job, decoded, result_of

from ps_accordion.codecs import Coding, get, norm
from ps_accordion.regimes import Choice
from ps_accordion.server.shard import Shard
from ps_accordion.wire import messages as m

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
