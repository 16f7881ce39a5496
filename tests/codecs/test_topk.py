import numpy as np
import pytest

from ps_accordion.codecs import Hint, get
from ps_accordion.codecs.kernels import choose
from ps_accordion.codecs.largest import mix

from .cases import Case, decode, encode, gaussian


def select(v, k, hint=None):
    """Return the indices that are chosen, having checked what else is said of them."""
    out = np.empty_like(v)
    chosen = mix(v, np.float32(1), np.zeros_like(v), out, k, hint)
    assert np.array_equal(out, v)
    assert np.array_equal(chosen.values, v[chosen.places])
    assert chosen.peak == np.abs(v).max().view(np.int32)
    return chosen.places.copy()


def largest(v, k):
    """Return the indices of the k largest, ties to the lowest index, without zeros."""
    order = np.argsort(-np.abs(v), kind="stable")[:k]
    return np.sort(order[v[order] != 0])


@pytest.mark.parametrize("n", [1, 2, 70, 8191, 8192, 60_000])
def test_exactly_the_largest_are_chosen_whatever_the_sample_says(n):
    """Smooth, tied, sparse and adversarial vectors, from one element to all: never an approximation."""
    rng = np.random.default_rng(n)
    clustered = gaussian(n) * np.float32(1e-3)
    clustered[: max(1, n // 50)] += 10
    vectors = [
        gaussian(n),
        clustered,
        rng.integers(-3, 4, n).astype(np.float32),
        (gaussian(n) * (rng.random(n) < 0.003)).astype(np.float32),
        np.full(n, -2.5, np.float32),
        np.float32(2.0) ** -(np.arange(n) % 140).astype(np.float32),
        np.nextafter(np.float32(1), np.float32(2)) * np.where(rng.random(n) < 0.5, 1, 1 + 2e-7).astype(np.float32),
    ]
    for v in vectors:
        for k in sorted({1, 2, max(1, n // 1000), max(1, n // 100), max(1, n // 3), n - 1 or 1, n}):
            assert np.array_equal(select(v, k), largest(v, k)), k


def _narrowed(v, k, low):
    """Return the indices that `narrow` leaves of all elements, in order, whose magnitude bits reach `low`."""
    index = np.flatnonzero((v.view(np.uint32) & 0x7FFFFFFF) >= low).astype(np.uint32)
    found, words = index.size, v[index].view(np.uint32)
    scratch, counts, seen = np.empty(found + 1, np.uint32), np.empty(choose.BINS, np.int32), np.empty(2, np.int32)
    kept = choose.narrow(k, low, found, index, words, scratch, counts, seen)
    assert np.array_equal(words[:kept], v[index[:kept]].view(np.uint32))
    assert seen[0] == np.abs(v).max().view(np.int32)
    assert seen[1] <= np.abs(v[index[:kept]]).min().view(np.int32)
    return index[:kept]


@pytest.mark.parametrize("n", [1, 15, 16, 17, 4099, (1 << 15) - 1, 1 << 15, 100_003])
def test_candidates_are_narrowed_to_the_largest_however_many_there_are(n):
    """Also where there are so many that a sample says where to look, and where it is wrong; ties in any number, anywhere."""
    rng = np.random.default_rng(n)
    step = max(1, n // choose.SAMPLES)
    misled = np.linspace(1, 2, n, dtype=np.float32)
    misled[::step] = 5  # the sample sees nothing else
    turned = np.linspace(3, 2, n, dtype=np.float32)
    turned[::step] = 1
    vectors = [
        gaussian(n) + np.float32(0.1),
        np.round(gaussian(n) * 50) / np.float32(50) + np.float32(1e-3),
        rng.integers(1, 4, n).astype(np.float32) * rng.choice([-1, 1], n).astype(np.float32),
        np.full(n, -2.5, np.float32),
        np.sort(gaussian(n)) + np.float32(10),
        misled,
        turned,
    ]
    for v in vectors:
        for k in sorted({1, 2, 16, n // 100, n // 2, n - n // 100, n - 1} & set(range(1, n))):
            assert np.array_equal(_narrowed(v, k, 1), largest(v, k)), k
            low = np.sort(np.abs(v))[::-1][min(n - 1, 2 * k)].view(np.int32)
            assert np.array_equal(_narrowed(v, k, int(low)), largest(v, k)), k


@pytest.mark.parametrize("n", [1, 64, 8191, 60_000])
def test_what_is_remembered_changes_no_choice(n):
    """Whatever the vectors before were like: larger, smaller, the same, all zeros; and whatever the hint says."""
    rng = np.random.default_rng(n)
    hint = Hint()
    sizes = [1, 1, 1.01, 1.02, 1e3, 1e3, 1e-3, 0, 1, 1e30, 1e-40]
    for k in (max(1, n // 100), n):
        for size in sizes:
            v = (rng.standard_normal(n) * size).astype(np.float32)
            assert np.array_equal(select(v, k, hint), largest(v, k)), size
    v = gaussian(n)
    for threshold in (1, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF):
        hint.threshold = threshold
        assert np.array_equal(select(v, max(1, n // 10), hint), largest(v, max(1, n // 10)))


def test_a_sum_is_rounded_twice_and_may_lie_in_the_place_of_a_part():
    """As numpy does it, an element beyond the last 64 included."""
    a, b = gaussian(1000), gaussian(1000, 1)
    scale = np.float32(1 / 3)
    expected = a * scale + b
    for out in (np.empty_like(a), b.copy()):
        assert mix(a, scale, b if out is not b else out, out, 10, Hint(threshold=1 << 30)) is not None
        assert np.array_equal(out, expected)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("threshold", [0, 1, 0x7F000000, 0x7FFFFFFF])
def test_what_is_not_finite_is_seen_whatever_the_threshold(bad, threshold):
    """It has the largest bits of all, so it is a candidate where there is a threshold at all."""
    for at in (0, 70, 999):
        v = gaussian(1000)
        v[at] = bad
        assert mix(v, np.float32(1), np.zeros_like(v), np.empty_like(v), 10, Hint(threshold=threshold)) is None


def test_a_sample_that_misses_every_large_element_still_gives_the_largest():
    """The places of the sample are fixed, so a vector can avoid them; then all elements become candidates."""
    n, k = 60_000, 600
    seen = np.zeros(n, np.float32)
    state = 0x9E3779B97F4A7C15
    sampled = []
    for i in range(choose.SAMPLES):
        first = i * n // choose.SAMPLES
        stretch = (i + 1) * n // choose.SAMPLES - first
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        sampled.append(first + ((state >> 40) * stretch >> 24))
    seen[sampled] = 5 + gaussian(len(sampled))
    for v in (seen, np.where(seen == 0, 100 + gaussian(n), 1e-3).astype(np.float32)):
        assert np.array_equal(select(v, k), largest(v, k))


def test_zeros_are_never_sent():
    """All zero: no entries, only preamble and counts; and a vector with fewer than k others sends those."""
    coding, payload = encode(Case("topk", 0.5), np.zeros(40_000, np.float32), np.zeros(40_000, np.float32))
    assert (coding.count, payload.size) == (0, 4 + 2 * 2)
    v = np.zeros(40_000, np.float32)
    v[[5, 39_999]] = 1.5, -2.5
    coding, payload = encode(Case("topk", 0.5), v, np.zeros(40_000, np.float32))
    assert coding.count == 2
    assert np.array_equal(decode(Case("topk", 0.5), coding, payload), v)


def test_a_tied_vector_respects_the_bound_and_sends_the_first():
    """Constant input is where thresholds send everything."""
    v = np.full(100_000, 0.25, np.float32)
    coding, payload = encode(Case("topk", 0.01), v, np.zeros(v.size, np.float32))
    assert coding.count == 1000
    assert np.array_equal(decode(Case("topk", 0.01), coding, payload), np.where(np.arange(v.size) < 1000, v, 0))


def test_k_is_a_ceiling_and_at_least_one():
    """The formula other implementations must follow, in float64."""
    topk = get("topk")
    assert [topk.kept(n, level) for n, level in ((1, 1e-9), (100, 0.01), (101, 0.01), (100, 0.07), (7, 1.0))] == [1, 1, 2, 8, 7]


@pytest.mark.parametrize("magnitudes", [(1e-3, 1e-3, 1e25, 1e25), (1e-3, 1e-3, 1e27, 1e27), (0.0, 1e-40, 1e20, 1e20)])
def test_what_is_remembered_of_a_jump_expects_no_more_than_there_are_numbers(magnitudes):
    """A run that diverges grows by many octets in a step, and what was expected after it once lay beyond every float."""
    codec, n, hint = get("topk"), 1 << 16, Hint()
    residual, rest, out = np.zeros(n, np.float32), np.empty(n, np.float32), np.empty(codec.payload_bound(n, 0.01), np.uint8)
    plain, alone = np.zeros(n, np.float32), np.empty_like(out)
    for step, magnitude in enumerate(magnitudes):
        v = gaussian(n, step) * np.float32(magnitude)
        done = codec.encode(v, residual, level=0.01, seed=1, out=out, rest=rest, hint=hint)
        assert done == codec.encode(v, plain, level=0.01, seed=1, out=alone)
        assert np.array_equal(out[: done.nbytes], alone[: done.nbytes])
        assert 0 <= hint.threshold <= 0x7F800000
        residual, rest = rest, residual
