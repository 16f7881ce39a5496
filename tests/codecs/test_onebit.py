import numpy as np
import pytest
import torch
import twins

from ps_accordion.codecs import Push, device, encode_holding, get, sum_decoded
from ps_accordion.errors import CodecError, PayloadError

from .cases import Case, decode, encode, gaussian


def lost(case, v):
    """Return ||v - D(C(v))||^2 / ||v||^2."""
    coding, payload = encode(case, v, np.zeros_like(v))
    rest = v.astype(np.float64) - decode(case, coding, payload)
    return float((rest**2).sum() / (v.astype(np.float64) ** 2).sum())


def on_host(gradient, residual, held):
    encode_holding(get("onebit"), gradient, residual, held, level=64, seed=0, out=np.empty(100, np.uint8))


def on_device(gradient, residual, held):
    gradient, residual = torch.from_numpy(gradient), torch.from_numpy(residual)
    device.encode(device.twin_of(get("onebit")), gradient, residual, level=64, seed=0, held=held)


def test_the_smallest_chunks_add_up_to_what_they_are():
    """Signs of the vector, the mean magnitude of each chunk of 64, and a tail that is a chunk of its own."""
    v = np.concatenate([np.full(64, 2.0), np.full(64, -1.0), [3.0, -1.0]]).astype(np.float32)
    coding, payload = encode(Case("onebit", 64), v, np.zeros_like(v))
    assert payload[:12].view(np.float32).tolist() == [2.0, 1.0, 2.0]
    assert payload[12:].view(np.uint32).tolist() == [0, 0, 0xFFFFFFFF, 0xFFFFFFFF, 2]
    assert decode(Case("onebit", 64), coding, payload).tolist() == [2.0] * 64 + [-1.0] * 64 + [2.0, -2.0]


@pytest.mark.parametrize("level", [64, 4096, 65536])
def test_lengths_around_words_and_chunks_agree_with_the_twin(level):
    """Tails shorter than a word, than 64 elements and than a chunk, and none at all."""
    case = Case("onebit", level)
    for n in (1, 31, 32, 33, 64, 95, 97, level - 1, level, level + 1, level + 65, 2 * level + 7):
        v, kept = gaussian(n), gaussian(n, 1)
        expected = twins.encode("onebit", level, v, kept)
        coding, payload = encode(case, v, kept)
        assert payload.tobytes() == expected.payload, n
        assert kept.tobytes() == expected.rest.tobytes(), n
        assert decode(case, coding, payload).tobytes() == twins.decode(coding, payload).tobytes(), n


def test_the_mean_magnitude_loses_less_than_there_was_where_the_root_mean_square_loses_more():
    """A vector with one element in a hundred: others' size would lose 1.84 of its energy."""
    v = (gaussian(1 << 18) * (np.random.default_rng(0).random(1 << 18) < 0.01)).astype(np.float32)
    assert 0.98 < lost(Case("onebit", 4096), v) < 1
    rms = np.sqrt(np.mean(v.astype(np.float64) ** 2))
    assert ((v - np.where(v < 0, -rms, rms)) ** 2).sum() / (v.astype(np.float64) ** 2).sum() > 1.7


def test_a_size_a_chunk_fits_a_vector_whose_parts_differ():
    """What is lost is that of each part by itself: 1 - 2 / pi for normal numbers, however they are scaled."""
    v = gaussian(1 << 18) * np.repeat(np.geomspace(1e-3, 1, 16, dtype=np.float32), 1 << 14)
    assert lost(Case("onebit", 4096), v) == pytest.approx(1 - 2 / np.pi, abs=0.01)


def test_zeros_decode_to_zeros_and_tiny_numbers_to_no_minus_zero():
    """A mean that rounds to zero loses the chunk, no more."""
    v = np.zeros(100, np.float32)
    v[3] = -(2.0**-149)
    for vector in (v, np.zeros_like(v)):
        residual = np.zeros_like(v)
        coding, payload = encode(Case("onebit", 64), vector, residual)
        assert decode(Case("onebit", 64), coding, payload).tobytes() == bytes(400)
        assert residual.tobytes() == vector.tobytes()


def test_a_fold_of_many_has_the_bits_of_one_after_another():
    """Members of one level are summed in one pass, of several levels in turn; neither differs from accumulating by a bit."""
    n, codec = 10_007, get("onebit")
    for levels in ([1024] * 5, [1024, 64, 1024]):
        made = [encode(Case("onebit", level), gaussian(n, i), np.zeros(n, np.float32)) for i, level in enumerate(levels)]
        pushes = [Push(0.3 + i, coding, payload) for i, (coding, payload) in enumerate(made)]
        total, expected = np.full(n, np.nan, np.float32), np.zeros(n, np.float32)
        sum_decoded(pushes, total)
        for weight, coding, payload in pushes:
            codec.accumulate(payload, coding, np.float32(weight), expected)
        assert total.tobytes() == expected.tobytes()


def test_a_stretch_is_what_decoding_has_there():
    """Wherever it begins and ends, from a payload at an odd address."""
    n, codec = 5000, get("onebit")
    coding, payload = encode(Case("onebit", 512), gaussian(n), np.zeros(n, np.float32))
    payload = np.frombuffer(b"x" + payload.tobytes(), np.uint8)[1:]
    whole = decode(Case("onebit", 512), coding, payload)
    for start, length in ((0, n), (1, 1), (500, 30), (63, 1025), (4999, 1), (100, 0)):
        out = np.full(length, np.nan, np.float32)
        codec.peek(payload, coding, start, out)
        assert out.tobytes() == whole[start : start + length].tobytes()


@pytest.mark.parametrize("level", [32, 63, 96, 1 << 17, 64.5, -64, 1e300])
def test_a_chunk_is_a_power_of_two(level):
    """The message names the legal range."""
    with pytest.raises(CodecError, match="a power of two from 64 to 65536"):
        get("onebit").check_level(level)


def test_a_payload_is_refused_for_each_thing_that_can_be_wrong():
    """Length, count, level, sizes that no mean is, and signs of elements that are not there."""
    coding, good = encode(Case("onebit", 64), gaussian(100), np.zeros(100, np.float32))
    codec = get("onebit")
    codec.validate(good, coding)

    def refuse(match, header=coding, payload=good):
        with pytest.raises(PayloadError, match=match):
            codec.validate(payload, header)

    for size in (np.nan, np.inf, -1.0, -0.0):
        bad = good.copy()
        bad[4:8].view(np.float32)[:] = size
        refuse("finite and not below zero", payload=bad)
    bad = good.copy()
    bad[-1] |= 0x80
    refuse("no sign beyond element 100", payload=bad)
    refuse("100 entries in 24 bytes", payload=good[:-1])
    refuse("100 entries in 24 bytes", payload=np.concatenate([good, good[:4]]))
    refuse("100 entries in 24 bytes", header=coding._replace(count=99))
    refuse("expected a level", header=coding._replace(level=float("nan")))
    refuse("got 100 entries in 24", header=coding._replace(level=128.0))


@pytest.mark.parametrize("encode_held", [on_host, on_device], ids=["host", "device"])
def test_spans_are_not_held_by_a_codec_that_sends_something_for_zeros(encode_held):
    """Fused keys go dense; if one did not, what is sent for the unused part would be lost to everybody's sums."""
    with pytest.raises(CodecError, match="cannot hold spans"):
        encode_held(np.zeros(100, np.float32), np.zeros(100, np.float32), [(3, 5)])


def descend(feedback):
    """Return the largest gradient after 4,000 steps on a quadratic, if a bit an element is all that moves it."""
    rng = np.random.default_rng(0)
    n, case = 64, Case("onebit", 64)
    curvature = np.geomspace(0.01, 1, n).astype(np.float32)
    goal, x, residual = rng.standard_normal(n).astype(np.float32), np.zeros(n, np.float32), np.zeros(n, np.float32)
    for _ in range(4000):
        gradient = curvature * (x - goal)
        if not feedback:
            residual[:] = 0
        coding, payload = encode(case, gradient, residual)
        x -= np.float32(0.1) * decode(case, coding, payload)
    return float(np.abs(curvature * (x - goal)).max())


def test_a_quadratic_is_solved_with_feedback():
    """As without compression: the gradient vanishes."""
    assert descend(feedback=True) < 1e-3


def test_without_feedback_a_step_may_lead_nowhere():
    """Karimireddy's counter-example, in one chunk: the gradients of two alternating losses, whose sum shrinks x, only grow it.

    Rows are a_1 = (1, -1) + e (1, 1) and a_2 = -(1, -1) + e (1, 1); the signs of either keep x_1 + x_2 where it is.
    """
    rows = np.array([[1.5, -0.5], [-0.5, 1.5]], np.float32)

    def run(feedback):
        case, x, residual = Case("onebit", 64), np.array([1.0, 1.0], np.float32), np.zeros(2, np.float32)
        for step in range(2000):
            row = rows[step % 2]
            if not feedback:
                residual[:] = 0
            coding, payload = encode(case, 2 * row * (row @ x), residual)
            x -= np.float32(0.02) * decode(case, coding, payload)
        return float(x.sum())

    assert run(feedback=False) == pytest.approx(2.0, abs=0.1)
    assert abs(run(feedback=True)) < 0.1
