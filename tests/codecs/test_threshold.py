import numpy as np
import pytest

from ps_accordion.codecs import Hint, get, lighter
from ps_accordion.errors import CodecError, PayloadError

from .cases import Case, decode, encode, gaussian


def sent(case, v):
    """Return what a payload of `v` stands for, and the residual."""
    residual = np.zeros_like(v)
    coding, payload = encode(case, v, residual)
    return decode(case, coding, payload), residual


@pytest.mark.parametrize("n", [1, 63, 64, 65, 20_000])
def test_exactly_what_reaches_the_threshold_is_sent(n):
    """The threshold itself too, of either sign; the next smaller number is not."""
    v = gaussian(n)
    v[n // 2] = -2.5
    v[n // 3 : n // 2] = np.nextafter(np.float32(2.5), np.float32(0))
    decoded, residual = sent(Case("threshold", 2.5, "fp32"), v)
    assert np.array_equal(decoded, np.where(np.abs(v) >= np.float32(2.5), v, 0))
    assert np.array_equal(decoded + residual, v)


def test_a_threshold_counts_as_float32():
    """0.1 is rounded as the elements are, so that an element of 0.1 reaches it."""
    v = np.full(100, 0.1, np.float32)
    assert np.count_nonzero(sent(Case("threshold", 0.1, "fp32"), v)[0]) == 13


def test_where_more_reach_it_than_the_cap_allows_the_largest_are_sent():
    """Then it is topk at the cap, ties included, and what waits is sent in the rounds after."""
    v, n = gaussian(10_001), 10_001
    v[100:3000] = 5.0
    topk, _ = sent(Case("topk", 0.125, "fp32"), v)
    decoded, residual = sent(Case("threshold", 0.01, "fp32"), v)
    assert np.array_equal(decoded, topk)
    case, total, rounds = Case("threshold", 0.01), decoded, 1
    while (np.abs(residual) >= np.float32(0.01)).any():
        coding, payload = encode(case, np.zeros(n, np.float32), residual)
        assert coding.count <= 1251
        total = total + decode(case, coding, payload)
        rounds += 1
    assert rounds == 8
    assert np.abs(total + residual - v).max() < 1e-5


def test_constant_and_zero_vectors_neither_send_all_nor_nothing_by_mistake():
    """Elsewhere, sampled thresholds sent nothing of a constant vector, and everything of a zero one."""
    zero, constant = np.zeros(40_000, np.float32), np.full(40_000, 0.25, np.float32)
    for form in ("fp16", "fp32", "int8", "packed"):
        for codec, level in (("threshold", 0.25), ("topk", 0.125)):
            coding, _ = encode(Case(codec, level, form), zero, np.zeros_like(zero))
            assert coding.count == 0
            decoded, _ = sent(Case(codec, level, form), constant)
            assert np.array_equal(decoded, np.where(np.arange(40_000) < 5000, constant, 0))


def test_the_price_is_that_of_the_cap_whatever_the_threshold():
    """So a lower threshold is no switch to lighter compression, and residuals are kept."""
    codec = get("threshold", cap=0.01, values="packed")
    assert codec.payload_bound(100_000, 0.5) == codec.payload_bound(100_000, 1e-3) == 8 + 2 * 1000 + 2 * 25
    assert not lighter(("threshold", 1e-3), ("threshold", 0.5), 100_000)
    assert codec.lightness(1e-3) > codec.lightness(0.5)


@pytest.mark.parametrize("cap", [0, -0.1, 0.26, 1, float("nan")])
def test_a_cap_that_would_go_dense_is_refused(cap):
    """The message says what is legal."""
    with pytest.raises(CodecError, match=rf"threshold: expected a cap in \(0, 0\.25\], a fraction of elements, got {cap!r}"):
        get("threshold", cap=cap)


def test_a_payload_of_a_member_with_a_larger_cap_is_refused():
    """Memory is made for the cap that all have agreed on."""
    v, generous = gaussian(1000), get("threshold", cap=0.25)
    out = np.empty(generous.payload_bound(1000, 0.1), np.uint8)
    encoded = generous.encode(v, np.zeros_like(v), level=0.1, seed=0, out=out)
    coding, _ = encode(Case("threshold", 0.1), v, np.zeros_like(v))
    with pytest.raises(PayloadError, match=r"threshold: expected at most 125 of 1000 entries .* got 250 entries"):
        get("threshold").validate(out[: encoded.nbytes], coding._replace(count=encoded.count))


@pytest.mark.parametrize("n", [64, 8191, 60_000])
def test_what_is_remembered_where_too_many_reach_the_threshold_changes_no_bit(n):
    """Whatever the vectors before were like, and whether the cap held back much, little or nothing in them."""
    codec, level, hint = get("threshold"), 3.0, Hint()
    residual, rest = np.zeros(n, np.float32), np.empty(n, np.float32)
    plain, out = residual.copy(), np.empty(codec.payload_bound(n, level), np.uint8)
    alone, capped = np.empty_like(out), set()
    for step, size in enumerate([1, 1, 0.5, 50, 1, 1e-3, 1e-3, 1, 1e30, 1e-40, 0, 0.2, 1, 1]):
        v = gaussian(n, step) * np.float32(size)
        done = codec.encode(v, residual, level=level, seed=1, out=out, rest=rest, hint=hint)
        assert done == codec.encode(v, plain, level=level, seed=1, out=alone)
        assert np.array_equal(out[: done.nbytes], alone[: done.nbytes])
        assert np.array_equal(rest.view(np.uint32), plain.view(np.uint32))
        assert (hint.threshold > 0) == (done.count == codec.kept(n, level))
        capped.add(hint.threshold > 0)
        residual, rest = rest, residual
        broken = gaussian(n, step)
        broken[n // 2] = np.nan
        assert codec.encode(broken, residual, level=level, seed=1, out=alone, rest=np.empty_like(rest), hint=hint) is None
    assert capped == {True, False}
