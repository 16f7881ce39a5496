import numpy as np
import pytest

from ps_accordion.codecs import get
from ps_accordion.codecs.kernels import sparse

from .cases import Case, decode, encode, gaussian


def select(v, k):
    """Return the indices that the kernel chooses."""
    index, magnitude = (np.empty(sparse.room(v.size), np.uint32) for _ in range(2))
    peak = int(np.abs(v).max().view(np.int32))
    return index[: sparse.select(v, k, peak, index, magnitude, np.empty(sparse.BINS, np.int32))]


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


def test_a_sample_that_misses_every_large_element_still_gives_the_largest():
    """The places of the sample are fixed, so a vector can avoid them; then all elements become candidates."""
    n, k = 60_000, 600
    seen = np.zeros(n, np.float32)
    state = 0x9E3779B97F4A7C15
    sampled = []
    for i in range(sparse.SAMPLES):
        first = i * n // sparse.SAMPLES
        stretch = (i + 1) * n // sparse.SAMPLES - first
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
