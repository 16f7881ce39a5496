"""A worker's side of a key: what the payload does not carry stays, and what is taken back is there again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import gaussian, layout_of, settings_of

from ps_accordion.codecs import get, norm
from ps_accordion.regimes import Choice
from ps_accordion.worker.coder import KeyCoder, Pushed, coding_of

CHOICES = [Choice("topk", 0.05), Choice("topk", 0.3), Choice("random_block", 0.1), Choice("dense", 16.0), Choice("dense", 32.0)]
FUSED, LARGE = 0, 1


def coder(key: int = LARGE, **options) -> KeyCoder:
    """Return the coder of one key of the small job, at worker 1."""
    settings = settings_of(**options)
    return KeyCoder(0, layout_of(settings).keys[key], settings, slot=1, incarnation=2)


def encode(of: KeyCoder, gradient, round_: int = 0, *, used: int | None = None, choice: Choice = CHOICES[0]) -> Pushed:
    used = of.key.all_used if used is None else used
    return of.encode(gradient, round_=round_, used=used, choice=choice, previous_skipped=False)


def decoded(pushed: Pushed) -> np.ndarray:
    out = np.empty(pushed.message.elements, np.float32)
    assert pushed.payload is not None
    get(pushed.message.codec).validate(pushed.payload, coding_of(pushed.message))
    get(pushed.message.codec).decode(pushed.payload, coding_of(pushed.message), out)
    return out


def residual(of: KeyCoder) -> np.ndarray:
    return np.zeros(of.key.elements, np.float32) if of.residual is None else of.residual.copy()


@given(st.lists(st.tuples(st.sampled_from(CHOICES), st.booleans()), min_size=1, max_size=12))
def test_what_was_computed_is_what_was_pushed_and_what_is_left(steps):
    """Over rounds of changing codecs and levels, some skipped and taken back: the gradients' sum = counted pushes + residual."""
    of = coder(codec_residual_at_switch="keep")
    computed = np.zeros(2048, np.float64)
    counted = np.zeros(2048, np.float64)
    for round_, (choice, skipped) in enumerate(steps):
        gradient = gaussian(2048, round_)
        pushed = encode(of, gradient, round_, choice=choice)
        computed += gradient
        if skipped:
            of.take_back(pushed.message, pushed.payload)
        else:
            counted += decoded(pushed)
    np.testing.assert_allclose(counted + residual(of), computed, rtol=0, atol=1e-4)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_is_skipped(choice, bad):
    """The push says SKIP and carries nothing; the residual keeps every bit."""
    of = coder(codec_residual_at_switch="keep")
    encode(of, gaussian(2048, 1), choice=CHOICES[0])
    before = residual(of)
    gradient = gaussian(2048, 2)
    gradient[1234] = bad
    pushed = encode(of, gradient, 1, choice=choice)
    assert (pushed.message.kind, pushed.message.used, pushed.message.frames, pushed.payload) == ("SKIP", 0, [], None)
    assert pushed.message.weight == 1.0
    assert residual(of).tobytes() == before.tobytes()


def test_a_sum_with_the_residual_that_overflows_is_skipped():
    """The gradient is finite and the residual is, but not both together."""
    of = coder(codec_residual_at_switch="keep")
    huge = np.full(2048, 2e38, np.float32)
    encode(of, huge)
    before = residual(of)
    assert encode(of, huge, 1).message.kind == "SKIP"
    assert residual(of).tobytes() == before.tobytes()


def test_the_gradient_is_only_read():
    """It is the model's own memory, where the aggregate will stand."""
    for choice in CHOICES:
        gradient = gaussian(2048, 3)
        gradient.flags.writeable = False
        encode(coder(), gradient, choice=choice)


def test_a_slice_without_a_gradient_keeps_its_residual():
    """Whatever stands in its place, finite or not; its part of the payload is zero."""
    of = coder(FUSED)
    first, second = of.key.slices
    encode(of, gaussian(17, 1), choice=Choice("dense", 16.0))
    before = residual(of)
    gradient = gaussian(17, 2)
    gradient[second.offset :] = np.nan
    pushed = encode(of, gradient, 1, used=0b01, choice=Choice("dense", 16.0))
    assert (pushed.message.kind, pushed.message.used) == ("DATA", 0b01)
    assert not decoded(pushed)[second.offset :].any()
    assert decoded(pushed)[: first.length].all()
    assert residual(of)[second.offset :].tobytes() == before[second.offset :].tobytes()


def test_pushes_without_a_payload_leave_the_residual():
    """UNUSED, SKIP and JOINED count in the mean as much as they are told, EMPTY does not."""
    of = coder()
    encode(of, gaussian(2048, 1))
    before = residual(of)
    for kind in ("UNUSED", "SKIP", "JOINED", "EMPTY"):
        push = of.without_payload(kind, round_=3, previous_skipped=True)
        assert (push.kind, push.round, push.slot, push.incarnation, push.used, push.previous_skipped) == (kind, 3, 1, 2, 0, True)
        weights = [push.weight]
        weights += [of.without_payload(kind, round_=3, previous_skipped=True, weight=weight).weight for weight in (0.0, 2.5)]
        assert weights == ([0.0, 0.0, 0.0] if kind == "EMPTY" else [1.0, 0.0, 2.5])
    assert residual(of).tobytes() == before.tobytes()


@pytest.mark.parametrize("rule", ["keep", "clip", "reset"])
def test_the_rule_for_switches_holds_when_compression_turns_lighter(rule):
    """Once, and only then; what it throws away is stated, and no longer in the residual."""
    of = coder(codec_residual_at_switch=rule)
    heavy, light = Choice("topk", 0.001), Choice("topk", 0.1)
    for round_ in range(30):
        assert encode(of, gaussian(2048, round_), round_, choice=heavy).loss == 0.0
    before, gradient = norm(residual(of)), gaussian(2048, 30)
    loss = encode(of, gradient, 30, choice=light).loss
    expected = {"keep": 0.0, "clip": before - norm(gradient), "reset": before}[rule]
    assert loss == pytest.approx(expected, rel=1e-3)
    assert encode(of, gaussian(2048, 31), 31, choice=light).loss == 0.0
    assert encode(of, gaussian(2048, 32), 32, choice=heavy).loss == 0.0


def test_a_weight_stands_in_the_header_and_changes_no_bit_of_the_payload():
    """The shard multiplies; this worker's residual is in units of its own gradient."""
    light, heavy = coder(), coder()
    for round_ in range(3):
        gradient = gaussian(2048, round_)
        one = encode(light, gradient, round_)
        other = heavy.encode(gradient, round_=round_, used=1, choice=CHOICES[0], previous_skipped=False, weight=32.0)
        assert (one.message.weight, other.message.weight) == (1.0, 32.0)
        assert one.payload.tobytes() == other.payload.tobytes()
    assert residual(light).tobytes() == residual(heavy).tobytes()
    skipped = heavy.encode(gradient * np.nan, round_=3, used=1, choice=CHOICES[0], previous_skipped=False, weight=32.0)
    assert (skipped.message.kind, skipped.message.weight) == ("SKIP", 32.0)


def test_members_draw_the_same_block_and_different_rounds_another():
    """A shared seed follows from job, layout, key and round, and from no worker; other codecs send none."""
    settings = settings_of()
    key = layout_of(settings).keys[LARGE]
    coders = [KeyCoder(0, key, settings, slot=slot, incarnation=slot + 1) for slot in range(3)]
    block = Choice("random_block", 0.1)
    seeds = [[encode(each, gaussian(2048, round_), round_, choice=block).message.seed for each in coders] for round_ in range(3)]
    assert all(len(set(row)) == 1 for row in seeds)
    assert len({row[0] for row in seeds}) == 3
    assert encode(coders[0], gaussian(2048, 9), 9).message.seed == 0


def test_a_payload_is_not_written_again():
    """It is kept and sent again byte for byte, while the next rounds are encoded."""
    of = coder()
    first = encode(of, gaussian(2048, 0))
    before = first.payload.tobytes()
    for round_ in range(1, 5):
        encode(of, gaussian(2048, round_), round_)
    assert first.payload.tobytes() == before


def test_the_memory_of_a_payload_is_used_again_only_when_nobody_holds_it():
    """A copy that waits in a socket must not change; and a megabyte that nobody holds is not asked for anew."""
    of = coder()
    gradient = gaussian(2048)
    first = encode(of, gradient)
    assert first.payload is not None
    held, copy = first.payload.data, first.payload.copy()
    del first
    second = encode(of, gradient, 1)
    assert second.payload is not None
    assert np.array_equal(np.frombuffer(held, np.uint8), copy)
    assert not np.shares_memory(np.frombuffer(held, np.uint8), second.payload)
    place = second.payload.ctypes.data
    del second
    third = encode(of, gradient, 2)
    assert third.payload is not None
    assert third.payload.ctypes.data == place


def test_what_is_sent_exactly_carries_what_was_left():
    """Dense at 32 bits sends the residual of earlier levels along; what remains is zero, in this round and in later ones."""
    of = coder(codec_residual_at_switch="keep")
    encode(of, gaussian(2048))
    left = residual(of)
    assert left.any()
    for round_, expected in ((1, left), (2, np.zeros(2048, np.float32))):
        pushed = encode(of, gaussian(2048, 2), round_, choice=Choice("dense", 32.0))
        assert np.array_equal(decoded(pushed), gaussian(2048, 2) + expected)
        assert of.residual is not None
        assert not of.residual.any()
    encode(of, gaussian(2048, 3), 3)
    assert residual(of).any()


def test_a_push_of_a_round_that_was_made_again_without_it_is_an_item():
    """Of the last round that was decided here, not of the one that was open: that one comes back."""
    of = coder()
    for round_ in range(2):
        encode(of, gaussian(2048, round_), round_)
        of.account.decided(counted=True, applied=True)
    counted = of.account.closed(of.residual)
    lost = decoded(pushed := encode(of, gaussian(2048, 2), 2))
    of.account.decided(counted=True, applied=True)
    left = encode(of, gaussian(2048, 3), 3)
    of.account.decided(counted=False, applied=False, out=True)
    of.take_back(left.message, left.payload)
    assert of.account.uncounted() == pytest.approx(norm(lost))
    closed = of.account.closed(of.residual)
    assert closed.lost == pytest.approx(of.account.mass(lost))
    assert closed.went == pytest.approx(counted.went)
    assert abs(closed.difference) <= closed.slack
    assert of.account.uncounted() == 0.0
    assert pushed.message.round == 2


def test_a_flush_hands_over_every_bit_of_the_residual():
    """As dense at 32, with the slices that have any; nothing is left, and a second one has nothing to bring."""
    of = coder(FUSED)
    encode(of, gaussian(17, 1), used=0b01, choice=Choice("dense", 16.0))
    before = residual(of)
    pushed = of.flush(round_=4, previous_skipped=True, weight=2.0)
    said = pushed.message
    assert (said.kind, said.round, said.used, said.weight, said.previous_skipped) == ("FLUSH", 4, 0b01, 2.0, True)
    assert (said.codec, said.level, said.elements) == ("dense", 32.0, 17)
    assert decoded(pushed).tobytes() == before.tobytes()
    assert not np.any(of.host_residual() if of.host_residual() is not None else 0)
    again = of.flush(round_=5, previous_skipped=False, weight=2.0)
    assert (again.message.kind, again.message.used, again.payload) == ("FLUSH", 0, None)


def test_a_flush_of_a_skipped_round_comes_again_to_the_bit():
    """It is taken back, and what is handed over then is the same."""
    of = coder()
    encode(of, gaussian(2048, 1))
    first = of.flush(round_=1, previous_skipped=False, weight=1.0)
    of.take_back(first.message, first.payload)
    second = of.flush(round_=2, previous_skipped=True, weight=1.0)
    assert second.payload.tobytes() == first.payload.tobytes()
    assert of.account.closed(of.host_residual()).kept == 0.0
