"""What every codec promises, checked on all of them."""

import numpy as np
import pytest
import twins

from ps_accordion.errors import CodecError

from .cases import CASES, LENGTHS, SEED, adds_up, buffer, decode, encode, gaussian, vectors

pytestmark = pytest.mark.parametrize("case", CASES, ids=str)


def same(a, b):
    """Return whether two float vectors have the same bits."""
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("n", LENGTHS)
def test_a_worker_writes_the_bytes_and_the_residual_that_the_numpy_twin_writes(case, n):
    """Payload and residual agree with the twin to the bit, for every kind of vector, and decode to the same bits."""
    for name, v in vectors(n).items():
        for residual in (np.zeros(n, np.float32), gaussian(n, 7) * np.float32(np.abs(v).max() / 8))[: 2 if n < 20_000 else 1]:
            expected = twins.encode(case.codec, case.level, v, residual, seed=SEED, values=case.values)
            kept = residual.copy()
            done = encode(case, v, kept)
            if expected is None:
                assert done is None, name
                continue
            coding, payload = done
            assert payload.tobytes() == expected.payload, name
            assert coding.count == expected.count, name
            assert same(kept, expected.rest), name
            assert same(decode(case, coding, payload), twins.decode(coding, payload)), name


@pytest.mark.parametrize("n", LENGTHS)
def test_a_server_writes_the_bytes_and_the_residual_that_the_numpy_twin_writes(case, n):
    """`reencode` agrees with the twin to the bit, with a residual and without one, and only reads the old half."""
    codec = case.build()
    scale = np.float32(1 / 3)
    for name, v in vectors(n).items():
        for residual in (None, gaussian(n, 9)):
            before = None if residual is None else residual.copy()
            new = np.full(n, np.nan, np.float32)
            out = buffer(codec, case.level, n)
            expected = twins.reencode(case.codec, case.level, v, scale, residual, seed=SEED, values=case.values)
            done = codec.reencode(v.copy(), scale, residual, new, level=case.level, seed=SEED, out=out)
            assert done is not None, name
            assert expected is not None, name
            assert out[: done.nbytes].tobytes() == expected.payload, name
            assert same(new, expected.rest), name
            assert before is None or same(before, residual), name


def test_payload_and_residual_add_up_to_the_vector(case):
    """D(payload) + residual == v for every element, denormals too, but for rounded differences; or nothing is kept."""
    for n in (1, 1000, 32_769):
        for name, v in vectors(n).items():
            residual = np.zeros(n, np.float32)
            coding, payload = encode(case, v, residual)
            if not case.build().keeps(case.level):
                assert not residual.any(), name
                continue
            assert adds_up(case, decode(case, coding, payload) + residual, v), name


def test_taking_a_push_back_restores_the_vector(case):
    """Adding a payload to the residual with weight one gives v again, or D(payload): that is how a skipped round is undone."""
    v = gaussian(5000)
    residual = gaussian(5000, 3)
    expected = v + residual
    coding, payload = encode(case, v, residual)
    if not case.build().keeps(case.level):
        expected = twins.decode(coding, payload)
    case.build().accumulate(payload, coding, np.float32(1), residual)
    assert adds_up(case, residual, expected)


def test_the_residual_is_no_longer_than_the_vector(case):
    """||v - D(C(v))|| <= ||v|| for every vector: the contraction that error feedback needs."""
    for name, v in vectors(10_007).items():
        residual = np.zeros(v.size, np.float32)
        encode(case, v, residual)
        assert twins.norm(residual) <= twins.norm(v), name


def test_accumulate_adds_weight_times_what_decode_writes(case):
    """The sum is total + float32(weight) * D, each operation rounded by itself."""
    n, weight = 40_000, np.float32(0.3)
    coding, payload = encode(case, gaussian(n), np.zeros(n, np.float32))
    total = gaussian(n, 4)
    expected = total + weight * twins.decode(coding, payload)
    case.build().accumulate(payload, coding, weight, total)
    assert same(expected, total)


def test_encoding_twice_gives_the_same_bytes_and_leaves_the_first_payload_alone(case):
    """Scratch memory is shared between calls; payloads and residuals are not."""
    n = 40_000
    codec = case.build()
    first, second = buffer(codec, case.level, n), buffer(codec, case.level, n)
    one, two = np.zeros(n, np.float32), np.zeros(n, np.float32)
    done = codec.encode(gaussian(n), one, level=case.level, seed=SEED, out=first)
    copy, kept = first.copy(), one.copy()
    codec.encode(gaussian(n, 5), two, level=case.level, seed=SEED, out=second)
    assert np.array_equal(first, copy)
    assert same(one, kept)
    again = np.zeros(n, np.float32)
    assert codec.encode(gaussian(n), again, level=case.level, seed=SEED, out=second) == done
    assert np.array_equal(second[: done.nbytes], first[: done.nbytes])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("where", ["gradient", "residual", "sum"])
@pytest.mark.parametrize("at", [0, 4999, 39_999])
def test_what_is_not_finite_leaves_the_residual_as_it_was(case, bad, where, at):
    """NaN and infinity in the gradient, the residual or only in their sum: None, and not a bit changes."""
    v, residual = gaussian(40_000), gaussian(40_000, 6)
    if where == "gradient":
        v[at] = bad
    elif where == "residual":
        residual[at] = bad
    else:
        v[at] = residual[at] = np.finfo(np.float32).max
    before = residual.copy()
    assert encode(case, v, residual) is None
    assert same(before, residual)


def test_a_server_reports_a_sum_that_is_not_finite(case):
    """`reencode` returns None when scaling or the residual overflows."""
    codec = case.build()
    total, new = np.full(100, 3e38, np.float32), np.zeros(100, np.float32)
    out = buffer(codec, case.level, 100)
    assert codec.reencode(total, np.float32(2), None, new, level=case.level, seed=SEED, out=out) is None


def test_the_bound_is_what_the_twin_computes_and_is_reached(case):
    """The price of a level is the size of its largest payload, to the byte."""
    for n in LENGTHS:
        codec = case.build()
        bound = codec.payload_bound(n, case.level)
        assert bound == twins.payload_bound(case.codec, case.level, n, case.values)
        _, payload = encode(case, gaussian(n) + np.float32(9), np.zeros(n, np.float32))  # all reach any threshold here
        assert bound - payload.size in ((0, 4) if case.codec == "random_k" else (0,))  # a last stretch may send nothing


def test_a_payload_may_lie_anywhere_in_memory(case):
    """Received frames are read-only and start at any address."""
    n = 40_000
    coding, payload = encode(case, gaussian(n), np.zeros(n, np.float32))
    for shift in (1, 2, 3):
        frame = np.frombuffer(b"x" * shift + payload.tobytes(), np.uint8)[shift:]
        assert same(decode(case, coding, frame), twins.decode(coding, payload))
        total = np.zeros(n, np.float32)
        case.build().accumulate(frame, coding, np.float32(1), total)
        assert np.array_equal(total, twins.decode(coding, payload))


@pytest.mark.parametrize("level", [0, -1, 1.5, float("nan"), float("inf"), 5.5])
def test_a_level_outside_the_legal_range_is_refused(case, level):
    """The message names the codec and the level."""
    if case.codec == "threshold" and np.isfinite(level):
        level = -abs(level)  # which is all that is out of range
    with pytest.raises(CodecError, match=rf"{case.codec}: expected .* got {level!r}"):
        case.build().check_level(level)


def test_a_codec_that_loses_something_asks_for_a_residual(case):
    """Only what keeps nothing, and dense, work without one."""
    codec = case.build()
    call = lambda: codec.encode(gaussian(10), None, level=case.level, seed=SEED, out=buffer(codec, case.level, 10))  # noqa: E731
    if not codec.keeps(case.level) or case.codec == "dense":
        assert call() is not None
    else:
        with pytest.raises(CodecError, match="expected a residual"):
            call()


@pytest.mark.parametrize("n", [1, 1000, 32_769, 100_003])
def test_peeking_at_a_stretch_gives_the_bits_that_decoding_gives_there(case, n):
    """From any place, across chunks and to both ends, from memory that is only read; what the memory held before is gone."""
    coding, payload = encode(case, gaussian(n), np.zeros(n, np.float32))
    payload = np.frombuffer(payload.tobytes(), np.uint8)
    whole = decode(case, coding, payload)
    for start, length in [(0, n), (n // 2, n - n // 2), (n - 1, 1), (max(0, min(n, 32_868) - 200), 200), (n // 3, n // 7)]:
        out = np.full(min(length, n - start), np.nan, np.float32)
        case.build().peek(payload, coding, start, out)
        assert same(out, whole[start : start + length])
