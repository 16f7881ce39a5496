import math

import numpy as np
import pytest
import quantised

from ps_accordion.codecs import Coding, get
from ps_accordion.codecs.kernels.codes import MOST, PIECE
from ps_accordion.errors import CodecError, PayloadError

from .cases import SEED, Case, buffer, encode, gaussian, vectors

UNBIASED = [Case("natural", 8), Case("qsgd", 8), Case("qsgd", 4), Case("qsgd", 2)]


def decoded(case, v, seed):
    """Return D(C(v)) without a residual."""
    codec = case.build()
    coding, payload = encode(case, v, None, seed)
    out = np.empty_like(v)
    codec.decode(payload, coding, out)
    return out


@pytest.mark.parametrize("case", UNBIASED, ids=str)
def test_the_mean_over_seeds_is_the_vector(case):
    """Unbiased: z-tests of every coordinate, |z| < 5.5, and of their sum, |z| < 4, over 400 seeds of a fixed list."""
    tries, v = 400, gaussian(1000, 3)
    made = np.stack([decoded(case, v, SEED + i) for i in range(tries)]).astype(np.float64)
    error = (made - v).mean(axis=0)
    deviation = made.std(axis=0, ddof=1) / math.sqrt(tries)
    moving = deviation > 0
    assert moving.mean() > 0.9
    assert np.abs(error[moving] / deviation[moving]).max() < 5.5
    assert np.abs(error[~moving]).max(initial=0) < 12 / tries * np.abs(v).max()  # a chance of 12 in 400 shows
    assert abs(error.sum()) / math.sqrt((deviation**2).sum()) < 4


@pytest.mark.parametrize("case", UNBIASED, ids=str)
def test_noise_of_two_seeds_and_of_two_elements_is_not_alike(case):
    """Workers would otherwise add the same noise, and the mean would not take it away: correlation below 5 / sqrt(n)."""
    n = 40_000
    v = gaussian(n, 3)
    one, two = decoded(case, v, SEED) - v, decoded(case, v, SEED + 1) - v
    for a, b in ((one, two), (one[:-1], one[1:]), (one[:-256], one[256:]), (one[:-512], one[512:])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(n)


@pytest.mark.parametrize(("level", "nearest", "stochastic"), [(8, 5.6e-5, 1.12e-4), (4, 0.0185, 0.037), (2, 0.713, 1.62)])
def test_squared_errors_are_those_of_the_literature(level, nearest, stochastic):
    """Gaussian numbers, buckets of 512: rounding to nearest costs half of what stochastic rounding costs."""
    v = gaussian(1 << 18, 5)
    energy = float(np.square(v, dtype=np.float64).sum())
    rest = v.copy()
    encode(Case("int", level), np.zeros_like(v), rest)
    assert float(np.square(rest, dtype=np.float64).sum()) / energy == pytest.approx(nearest, rel=0.03)
    lost = (decoded(Case("qsgd", level), v, SEED) - v).astype(np.float64)
    assert float(np.square(lost).sum()) / energy == pytest.approx(stochastic, rel=0.03)


def test_natural_numbers_are_next_to_their_power_of_two_and_err_by_an_eighth():
    """Each element goes to the power of two below or above it, over 120 octaves; the mean error is 1/8 of the energy."""
    v = np.exp2(np.random.default_rng(0).uniform(-80, 40, 100_000)).astype(np.float32)
    made = decoded(Case("natural", 8), v, SEED)
    below = np.exp2(np.floor(np.log2(v.astype(np.float64))))
    assert ((made == below) | (made == 2 * below)).all()
    even = gaussian(1 << 18, 5)
    lost = (decoded(Case("natural", 8), even, SEED) - even).astype(np.float64)
    assert np.square(lost).sum() / np.square(even, dtype=np.float64).sum() < 1 / 8


def test_terngrad_is_the_vector_in_the_mean_where_nothing_is_clipped_and_clips_at_two_and_a_half_deviations():
    """Uniform numbers lie within 1.8 deviations: z-tests as for the others. An outlier comes out as 2.5 deviations."""
    case, tries = Case("terngrad", 2), 400
    v = np.random.default_rng(1).uniform(-1, 1, 1000).astype(np.float32)
    made = np.stack([decoded(case, v, SEED + i) for i in range(tries)]).astype(np.float64)
    deviation = np.maximum(made.std(axis=0, ddof=1), 0.1) / math.sqrt(tries)
    assert np.abs((made - v).mean(axis=0) / deviation).max() < 5.5
    v[3] = 100.0
    assert decoded(case, v, SEED)[3] == np.float32(2.5 * quantised.deviation(v[:512]))


@pytest.mark.parametrize("case", [Case("int", 8), *UNBIASED], ids=str)
@pytest.mark.parametrize("n", [0, 511, 512, 513])
def test_a_stretch_has_the_bits_that_the_whole_has(case, n):
    """Within a bucket, across several, to the last element, and of no length."""
    codec = case.build()
    coding, payload = encode(case, gaussian(3 * 512 + n), np.zeros(3 * 512 + n, np.float32))
    whole = np.empty(coding.elements, np.float32)
    codec.decode(payload, coding, whole)
    for start, end in ((0, 1), (5, 100), (500, 1400), (1024, coding.elements), (1300, 1300)):
        part = np.full(end - start, np.nan, np.float32)
        codec.peek(payload, coding, start, part)
        assert part.tobytes() == whole[start:end].tobytes()


@pytest.mark.parametrize("bucket", [128, 4096])
@pytest.mark.parametrize("name", ["int", "qsgd"])
def test_a_payload_says_what_its_bucket_is(name, bucket):
    """Whoever decodes it needs no option; without elements it is a preamble."""
    codec, plain = get(name, bucket=bucket), get(name)
    for n in (0, 1, bucket - 1, bucket, 5000):
        v = gaussian(n)
        out, residual = buffer(codec, 4, n), np.zeros(n, np.float32)
        encoded = codec.encode(v, residual, level=4, seed=SEED, out=out)
        payload, rest = quantised.pack(name, 4, v, SEED, bucket)
        assert out[: encoded.nbytes].tobytes() == payload
        assert len(payload) == codec.payload_bound(n, 4) == quantised.payload_bound(4, n, bucket)
        assert residual.tobytes() == rest.tobytes()
        coding, found = Coding(name, 4.0, n, n, 0), np.full(n, np.nan, np.float32)
        plain.validate(out[: encoded.nbytes], coding)
        plain.decode(out[: encoded.nbytes], coding, found)
        assert found.tobytes() == quantised.decode(name, 4, n, payload).tobytes()


@pytest.mark.parametrize(("name", "levels"), [("qsgd", (8, 4, 2)), ("natural", (8, 8, 8))])
@pytest.mark.parametrize("n", [0, 1000, PIECE, 3 * PIECE + 777])
@pytest.mark.parametrize("members", [3, MOST, 2 * MOST + 1])
def test_members_summed_piece_by_piece_are_those_summed_one_after_the_other(name, levels, n, members):
    """The same bits, also where members have other buckets and other levels, and are more than one pass takes."""
    codec, payloads, codings = get(name), [], []
    for i in range(members):
        level, bucket = levels[i % 3], (512, 128, 4096)[i % 3]
        member = get(name, bucket=bucket)
        out = buffer(member, level, n)
        encoded = member.encode(gaussian(n, i), None, level=level, seed=SEED + i, out=out)
        payloads.append(out[: encoded.nbytes])
        codings.append(Coding(name, float(level), n, encoded.count, 0))
    weights = [np.float32((1.0, 0.3, 2.5)[i % 3]) for i in range(members)]
    together, apart = np.full(n, np.nan, np.float32), np.full(n, np.nan, np.float32)
    codec.begin_all(payloads, codings, weights, together)
    codec.begin(payloads[0], codings[0], weights[0], apart)
    for payload, coding, weight in zip(payloads[1:], codings[1:], weights[1:], strict=True):
        codec.accumulate(payload, coding, weight, apart)
    assert together.tobytes() == apart.tobytes()


def test_a_residual_that_another_codec_left_goes_with_the_vector():
    """An unbiased codec encodes gradient + residual, and keeps nothing of it."""
    v, residual, rest = gaussian(1000), gaussian(1000, 1), np.full(1000, np.nan, np.float32)
    before = residual.copy()
    codec, out, same = get("qsgd"), *(buffer(get("qsgd"), 8, 1000) for _ in range(2))
    codec.encode(v, residual, level=8, seed=SEED, out=out, rest=rest)
    codec.encode(v + residual, None, level=8, seed=SEED, out=same)
    assert np.array_equal(out, same)
    assert np.array_equal(residual, before)
    assert not rest.any()


def test_what_is_too_small_waits_and_what_is_too_large_is_sent_in_parts():
    """The stated rule for numbers at both ends of float32, with `int`: nothing is lost, and nothing sent that is not finite."""
    tiny, huge = (vectors(1000)[name] for name in ("denormal", "largest"))
    rest = np.zeros(1000, np.float32)
    coding, payload = encode(Case("int", 8), tiny, rest)
    out = np.empty(1000, np.float32)
    get("int").decode(payload, coding, out)
    assert not out.any()
    assert np.array_equal(rest, tiny)
    rest = huge.copy()
    for _ in range(3):
        assert encode(Case("int", 8), np.zeros_like(huge), rest) is not None
    assert np.abs(rest).max() < huge[0] * 1e-2


def test_each_thing_that_can_be_wrong_is_refused():
    """Bucket, length, count, level and scales; codes may be anything."""
    coding, good = encode(Case("int", 4), gaussian(1000), np.zeros(1000, np.float32))
    codec = get("int")
    codec.validate(good, coding)

    def refuse(match, at=None, value=0, header=coding, payload=good):
        bad = payload.copy()
        if at is not None:
            bad[at : at + value.nbytes] = value.reshape(1).view(np.uint8)
        with pytest.raises(PayloadError, match=match):
            codec.validate(bad, header)

    for bucket in (0, 511, 8192, 0xFFFFFFFF):
        refuse("a bucket among", 0, np.uint32(bucket))
    refuse("expected 1000 entries in 536 bytes", 0, np.uint32(128))
    for scale in (0.0, -1.0, 2.0**-127, 2.0**121, np.nan, np.inf):
        refuse("scales from", 8, np.float32(scale))
    refuse("expected 1000 entries", header=coding._replace(count=999))
    refuse("expected 1000 entries", payload=good[:-1])
    refuse("a level among 8, 4, 2", header=coding._replace(level=3.0))
    refuse("preamble of 4 bytes", payload=good[:3])
    good = good.copy()
    good[12:] = 0
    codec.validate(good, coding)
    out = np.empty(1000, np.float32)
    codec.decode(good, coding, out)
    assert np.isfinite(out).all()


def test_a_bucket_that_no_payload_may_have_is_refused():
    """When the codec is made, not at the first gradient."""
    with pytest.raises(CodecError, match="int: expected a bucket among 128, 256, 512, 1024, 2048, 4096, got 500"):
        get("int", bucket=500)
