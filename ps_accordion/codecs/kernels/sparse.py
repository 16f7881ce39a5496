"""Choose the largest elements of a vector exactly, without sorting it; and read and write sparse vectors.

`select` works in three steps:

1. A stratified sample, one element at a pseudo-random place of each of some thousand equal stretches, gives a threshold that
   about 1.1 to 4 times k elements reach.
2. One pass collects those candidates, 64 comparisons at a time.
3. The k-th largest candidate is found by counting its leading bits, then the next bits within that bin, and so on.

The result does not depend on the sample: too few candidates means that all elements that are not zero become candidates.
So the choice is *the* top k, ties going to the lowest index, and any other implementation finds the same.
Zeros are never chosen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import (
    F32,
    F32_IN,
    I32,
    U16,
    U16_IN,
    U32,
    U32_IN,
    bits,
    boolean,
    count_bits,
    float32,
    helper,
    int32,
    int64,
    kernel,
    lowest_bit,
    mask64,
    void,
)

__all__ = ["BINS", "CHUNK_SHIFT", "SAMPLES", "add", "check", "gather", "locate", "put", "room", "scatter", "select"]

CHUNK_SHIFT = 15
"""Indices are written as 16 bits within chunks of 32,768 elements."""
BINS = 1 << 11
"""Bins of a counting pass: they fit into the first-level cache with room to spare."""
SAMPLES = 1 << 12
"""At 1 % of 256 Ki elements about 41 samples lie in the top k; taking 4 standard deviations more gives 1.7 k candidates."""

_MAGNITUDE = np.int32(0x7FFFFFFF)
_BIN_BITS = 11
_CHUNK = 1 << CHUNK_SHIFT
_OCTAVES = 12 << 23  # as magnitude bits
_DIRECT = 1 << 13  # below this many elements a sample costs more than it saves


@helper
def _kth(values: Any, k: Any, low: Any, peak: Any, counts: Any, passes: Any) -> Any:
    """Return (threshold, ties): the k largest are those above the threshold, and the first `ties` equal to it.

    Looks at values from `low` to `peak` only. If fewer than k are there, the threshold is `low - 1`; with too few passes it
    comes out too low, never too high.
    """
    base, shift, width = np.int64(low), np.int64(0), np.int64(peak) - low
    above = np.int64(0)
    while (width >> shift) >= BINS:
        shift += 1
    while True:
        counts[: (width >> shift) + 1] = 0
        for i in range(values.shape[0]):
            offset = np.int64(values[i]) - base
            if 0 <= offset <= width:
                counts[offset >> shift] += 1
        place = width >> shift
        while place >= 0 and above + counts[place] < k:
            above += counts[place]
            place -= 1
        if place < 0:
            return base - 1, np.int64(0)
        base += place << shift
        passes -= 1
        if above + counts[place] == k or (passes == 0 and shift > 0):
            return base - 1, np.int64(0)
        if shift == 0:
            return base, k - above
        width = (np.int64(1) << shift) - 1
        shift = max(np.int64(0), shift - _BIN_BITS)


@helper
def _sampled_threshold(v: Any, k: Any, peak: Any, sample: Any, counts: Any) -> Any:
    """Return magnitude bits that somewhat more than k elements of `v` reach, most likely."""
    n = v.shape[0]
    expected = SAMPLES * (k / n)
    rank = np.int64(expected + 4.0 * np.sqrt(expected) + 4.0)
    if rank >= SAMPLES:
        return np.int64(1)
    state = np.uint64(0x9E3779B97F4A7C15)
    for i in range(SAMPLES):
        first = i * n // SAMPLES
        stretch = (i + 1) * n // SAMPLES - first
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        at = first + np.int64(((state >> np.uint64(40)) * np.uint64(stretch)) >> np.uint64(24))
        sample[i] = np.uint32(bits(v[at]) & _MAGNITUDE)
    # One pass over the octaves below the peak is fine enough, and nearly always finds the rank there.
    low = max(np.int64(0), np.int64(peak) - _OCTAVES)
    threshold, _ = _kth(sample[:SAMPLES], rank, low, peak, counts, 1)
    if threshold < low and low > 0:
        threshold, _ = _kth(sample[:SAMPLES], rank, np.int64(0), peak, counts, 2)
    return max(threshold, np.int64(1))


@helper
def _collect(v: Any, threshold: Any, index: Any, magnitude: Any) -> Any:
    """List the elements whose magnitude bits reach the threshold, in order; return how many."""
    n = v.shape[0]
    whole = n - n % 64
    low = np.int32(threshold)
    found: Any = 0
    for start in range(0, whole, 64):
        mask: Any = mask64(v, start, low)
        if mask == np.uint64(0):
            continue
        # Three are listed whether they are there or not: what is too much is overwritten. A loop that ends after one here and
        # two there would cost a wrong guess of the processor each time.
        after = found + count_bits(mask)
        for ahead in range(3):
            index[found + ahead] = np.uint32(start + lowest_bit(mask))
            mask &= mask - np.uint64(1)
        found += 3
        while found < after:
            index[found] = np.uint32(start + lowest_bit(mask))
            mask &= mask - np.uint64(1)
            found += 1
        found = after
    for i in range(whole, n):
        if np.int32(bits(v[i]) & _MAGNITUDE) >= low:
            index[found] = np.uint32(i)
            found += 1
    for i in range(found):
        magnitude[i] = np.uint32(bits(v[index[i]]) & _MAGNITUDE)
    return found


@kernel(int64(F32_IN, int64, int32, U32, U32, I32))
def select(v: Any, k: Any, peak: Any, index: Any, magnitude: Any, counts: Any) -> Any:
    """Write the indices of the k largest magnitudes of `v`, rising, to the front of `index`; return how many.

    Fewer than k come back only if fewer than k are not zero.

    Args:
        v: float32[n], finite, n below 2^32.
        k: 1 to n.
        peak: Largest magnitude bits in `v`.
        index: uint32[room(n)].
        magnitude: uint32[room(n)], scratch.
        counts: int32[BINS], scratch.
    """
    n = v.shape[0]
    threshold = np.int64(1) if n < _DIRECT else _sampled_threshold(v, k, peak, magnitude, counts)
    found = _collect(v, threshold, index, magnitude)
    if found < k and threshold > 1:
        threshold = np.int64(1)
        found = _collect(v, threshold, index, magnitude)
    if found <= k:
        return found
    least, ties = _kth(magnitude[:found], k, threshold, peak, counts, 4)
    kept: Any = 0
    for i in range(found):
        word = np.int64(magnitude[i])
        tie = np.int64(word == least) & np.int64(ties > 0)
        index[kept] = index[i]
        kept += np.int64(word > least) + tie
        ties -= tie
    return kept


def room(elements: int) -> int:
    """Return the length of the scratch that `select` needs for a vector."""
    return max(elements + 3, SAMPLES)


@kernel(void(F32_IN, U32_IN, F32))
def gather(v: Any, index: Any, out: Any) -> None:
    """Write `v[index]` to `out`."""
    for j in range(index.shape[0]):
        out[j] = v[index[j]]


@kernel(void(F32_IN, U32_IN, F32))
def put(values: Any, index: Any, out: Any) -> None:
    """Write `values` to `out[index]`."""
    for j in range(index.shape[0]):
        out[index[j]] = values[j]


@kernel(void(U32_IN, U16, U16))
def locate(index: Any, places: Any, counts: Any) -> None:
    """Split rising indices into places within their chunk, and how many lie in each chunk."""
    for j in range(index.shape[0]):
        places[j] = np.uint16(index[j] & np.uint32(_CHUNK - 1))
    first: Any = 0
    for chunk in range(counts.shape[0]):
        end = (chunk + 1) << CHUNK_SHIFT
        low, high = first, index.shape[0]
        while low < high:
            middle = (low + high) // 2
            if np.int64(index[middle]) < end:
                low = middle + 1
            else:
                high = middle
        counts[chunk] = np.uint16(low - first)
        first = low


@kernel(boolean(U16_IN, U16_IN, int64))
def check(places: Any, counts: Any, elements: Any) -> Any:
    """Return whether places and counts describe rising indices below `elements`. Safe on any numbers."""
    first: Any = 0
    for chunk in range(counts.shape[0]):
        length = min(_CHUNK, elements - chunk * _CHUNK)
        last = first + np.int64(counts[chunk])
        if last > places.shape[0]:
            return False
        before: Any = -1
        for j in range(first, last):
            place = np.int64(places[j])
            if place <= before or place >= length:
                return False
            before = place
        first = last
    return first == places.shape[0]


@helper
def _scatter_chunk(values: Any, places: Any, out: Any) -> None:
    for j in range(places.shape[0]):
        out[np.int64(places[j])] = values[j]


@helper
def _add_chunk(values: Any, places: Any, weight: Any, total: Any) -> None:
    for j in range(places.shape[0]):
        total[np.int64(places[j])] += weight * values[j]


@kernel(void(F32_IN, U16_IN, U16_IN, F32))
def scatter(values: Any, places: Any, counts: Any, out: Any) -> None:
    """Write values to their places in `out`; the others keep what they hold. The payload has been checked."""
    first: Any = 0
    for chunk in range(counts.shape[0]):
        last = first + np.int64(counts[chunk])
        _scatter_chunk(values[first:last], places[first:last], out[chunk * _CHUNK :])
        first = last


@kernel(void(F32_IN, U16_IN, U16_IN, float32, F32))
def add(values: Any, places: Any, counts: Any, weight: Any, total: Any) -> None:
    """Add `weight * values` at their places in `total` (two roundings). The payload has been checked."""
    first: Any = 0
    for chunk in range(counts.shape[0]):
        last = first + np.int64(counts[chunk])
        _add_chunk(values[first:last], places[first:last], weight, total[chunk * _CHUNK :])
        first = last
