"""Make a sum and choose its largest elements exactly, without sorting it.

1. `mix` makes the vector and, in the same pass, lists the elements that reach a threshold, 64 comparisons at a time: they are
   *candidates*. The threshold may be anything; good is one that somewhat more than k elements reach.
2. Where fewer than k did, `guess` draws a stratified sample, one element at a pseudo-random place of each of some thousand equal
   stretches, for a threshold that about 1.1 to 4 times k elements reach, and `collect` lists those.
3. `narrow` finds the k-th largest candidate by counting its leading bits, then the next bits within that bin, and so on.

The result does not depend on threshold or sample, as long as there are k candidates: it is *the* top k, ties going to the lowest
index, and any other implementation finds the same.
Zeros are never chosen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import (
    F32,
    F32_IN,
    I32,
    U32,
    bits,
    count_bits,
    float32,
    flush,
    helper,
    int64,
    keep,
    kernel,
    lowest_bit,
    mask64,
    mix64,
    mix_past64,
    off_line,
    within,
)

__all__ = ["BINS", "FEW", "NOBODY", "SAMPLES", "append", "append_rest", "collect", "guess", "mix", "narrow", "room"]

BINS = 1 << 11
"""Bins of a counting pass: they fit into the first-level cache with room to spare."""
SAMPLES = 1 << 12
"""At 1 % of 256 Ki elements about 41 samples lie in the top k; taking 4 standard deviations more gives 1.7 k candidates."""
NOBODY = 0x7FFFFFFF
"""A threshold that no number reaches, and next to none of what is not a number."""

FEW, MANY = 3, 6
"""How many elements of a lane are listed whether they reach the threshold or not."""
BLOCK = 1 << 12
"""How many are listed is chosen anew after so many elements."""

_MAGNITUDE = np.int32(0x7FFFFFFF)
_MAGNITUDE_WORD = np.uint32(0x7FFFFFFF)
_BIN_BITS = 11
_OCTAVES = 12 << 23  # as magnitude bits
_DIRECT = 1 << 13  # below this many elements a sample costs more than it saves
_MANY_WORDS = 1 << 15  # and so it does below this many candidates


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


@kernel(int64(F32_IN, int64, U32, I32))
def guess(v: Any, k: Any, sample: Any, counts: Any) -> Any:
    """Return magnitude bits, 1 at least, that somewhat more than k elements of `v` reach, most likely.

    Args:
        v: float32[n].
        k: 1 to n.
        sample: uint32[SAMPLES], scratch.
        counts: int32[BINS], scratch.
    """
    n = v.shape[0]
    if n < _DIRECT:
        return np.int64(1)
    expected = SAMPLES * (k / n)
    rank = np.int64(expected + 4.0 * np.sqrt(expected) + 4.0)
    if rank >= SAMPLES:
        return np.int64(1)
    state, peak = np.uint64(0x9E3779B97F4A7C15), np.int64(0)
    for i in range(SAMPLES):
        first = i * n // SAMPLES
        stretch = (i + 1) * n // SAMPLES - first
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        at = first + np.int64(((state >> np.uint64(40)) * np.uint64(stretch)) >> np.uint64(24))
        word = np.int64(bits(v[at]) & _MAGNITUDE)
        sample[i], peak = np.uint32(word), max(peak, word)
    # One pass over the octaves below the peak is fine enough, and nearly always finds the rank there.
    low = max(np.int64(0), peak - _OCTAVES)
    threshold, _ = _kth(sample[:SAMPLES], rank, low, peak, counts, 1)
    if threshold < low and low > 0:
        threshold, _ = _kth(sample[:SAMPLES], rank, np.int64(0), peak, counts, 2)
    return max(threshold, np.int64(1))


@helper
def append(mask: Any, start: Any, v: Any, there: Any, index: Any, words: Any, found: Any, ahead: Any) -> Any:
    """Append the elements whose bits are set to the first `found` of the list; return how many there are then.

    They are those from `start` on, and lie in `v` from `there` on. `ahead`, `FEW` or `MANY`, is how many are there at most in
    general, and a constant.
    """
    after = found + count_bits(mask)
    # Some are listed whether they are there or not: what is too much is overwritten. A loop that ends after one here and
    # two there would cost a wrong guess of the processor each time.
    for place in range(found, found + ahead):
        at = lowest_bit(mask) & 63
        index[place], words[place] = np.uint32(start + at), np.uint32(bits(v[there + at]))
        mask &= mask - np.uint64(1)
    found += ahead
    while found < after:
        at = lowest_bit(mask)
        index[found], words[found] = np.uint32(start + at), np.uint32(bits(v[there + at]))
        mask &= mask - np.uint64(1)
        found += 1
    return after


@helper
def _append_sum(mask: Any, start: Any, a: Any, scale: Any, b: Any, index: Any, words: Any, found: Any, ahead: Any) -> Any:
    """Do what `append` does with elements of `a * scale + b`, made again: memory would be waited for. A NaN may be another."""
    after = found + count_bits(mask)
    for place in range(found, found + ahead):
        at = start + (lowest_bit(mask) & 63)
        index[place], words[place] = np.uint32(at), np.uint32(bits(a[at] * scale + b[at]))
        mask &= mask - np.uint64(1)
    found += ahead
    while found < after:
        at = start + lowest_bit(mask)
        index[found], words[found] = np.uint32(at), np.uint32(bits(a[at] * scale + b[at]))
        mask &= mask - np.uint64(1)
        found += 1
    return after


@helper
def append_rest(v: Any, first: Any, low: Any, index: Any, words: Any, found: Any) -> Any:
    """Append the elements of `v` from `first` on that reach a threshold, one by one; return how many there are then."""
    for i in range(first, v.shape[0]):
        if np.int32(bits(v[i]) & _MAGNITUDE) >= low:
            index[found], words[found] = np.uint32(i), np.uint32(bits(v[i]))
            found += 1
    return found


@helper
def _ahead(found: Any) -> Any:
    """Return how many of each lane to list if `found` elements of the last block reached the threshold; 0 is to look first.

    From 12 on every sixth lane has one, and from 96 on every sixteenth more than `FEW`: the processor would guess wrong often.
    """
    return np.int64(0) if found < 12 else np.int64(FEW) if found < 96 else np.int64(MANY)


@helper
def _mix_past(a: Any, scale: Any, b: Any, out: Any, low: Any, index: Any, words: Any) -> Any:
    """Do what `mix` does with whole lanes, past the cache."""
    found, ahead = np.int64(0), np.int64(0)
    whole = out.shape[0] // 64 * 64
    for first in range(0, whole, BLOCK):
        before, last = found, min(first + BLOCK, whole)
        for start in range(first, last, 64):
            mask: Any = mix_past64(a, scale, b, out, start, low)
            if ahead == MANY:
                found = _append_sum(mask, start, a, scale, b, index, words, found, MANY)
            elif ahead == FEW or mask != np.uint64(0):
                found = _append_sum(mask, start, a, scale, b, index, words, found, FEW)
        ahead = _ahead(found - before)
    flush(out)
    return found


@helper
def _mix_near(a: Any, scale: Any, b: Any, out: Any, low: Any, index: Any, words: Any) -> Any:
    """Do what `mix` does with whole lanes, through the cache."""
    found, ahead = np.int64(0), np.int64(0)
    whole = out.shape[0] // 64 * 64
    for first in range(0, whole, BLOCK):
        before, last = found, min(first + BLOCK, whole)
        for start in range(first, last, 64):
            mask: Any = mix64(a, scale, b, out, start, low)
            if ahead == MANY:
                found = append(mask, start, out, start, index, words, found, MANY)
            elif ahead == FEW or mask != np.uint64(0):
                found = append(mask, start, out, start, index, words, found, FEW)
        ahead = _ahead(found - before)
    return found


@kernel(int64(F32_IN, float32, F32_IN, F32, int64, int64, U32, U32))
def mix(a: Any, scale: Any, b: Any, out: Any, past: Any, threshold: Any, index: Any, words: Any) -> Any:
    """Set `out := a * scale + b` (two roundings), and list the elements whose magnitude bits reach the threshold, in order.

    What is not finite has the largest bits of all, so it is listed unless the threshold is above infinity.

    Args:
        a: float32[n], n below 2^32.
        scale: A factor.
        b: float32[n].
        out: float32[n]; may be `a` or `b`.
        past: 1 if it is other memory, and is to be written past the cache, else 0.
        threshold: Magnitude bits.
        index: uint32[room(n)], receives the places.
        words: uint32[room(n)], receives the elements, as bits.

    Returns:
        How many there are.
    """
    n = out.shape[0]
    whole = n - n % 64
    low = np.int32(threshold)
    if past != 0 and off_line(out) == 0:
        found = _mix_past(a, scale, b, out, low, index, words)
    else:
        found = _mix_near(a, scale, b, out, low, index, words)
    for i in range(whole, n):
        out[i] = a[i] * scale + b[i]
    return append_rest(out, whole, low, index, words, found)


@kernel(int64(F32_IN, int64, U32, U32))
def collect(v: Any, threshold: Any, index: Any, words: Any) -> Any:
    """List the elements whose magnitude bits reach the threshold, in order; see `mix`."""
    n = v.shape[0]
    whole = n - n % 64
    low = np.int32(threshold)
    found: Any = 0
    for start in range(0, whole, 64):
        mask: Any = mask64(v, start, low)
        if mask != np.uint64(0):
            found = append(mask, start, v, start, index, words, found, FEW)
    return append_rest(v, whole, low, index, words, found)


@helper
def _within(words: Any, low: Any, high: Any, out: Any) -> Any:
    """List the magnitudes of `words` from `low` to `high`; return how many they are."""
    rows = words.shape[0] // 16
    found = within(words, rows, np.int32(low), np.int32(high), out)
    for i in range(16 * rows, words.shape[0]):
        magnitude = np.int64(words[i] & _MAGNITUDE_WORD)
        out[found] = np.uint32(magnitude)
        found += np.int64(low <= magnitude) & np.int64(magnitude <= high)
    return found


@helper
def _sampled(words: Any, k: Any, threshold: Any, peak: Any, scratch: Any, counts: Any) -> Any:
    """Return (low, high), between which the k-th largest of many words lies most likely, with a tenth of them."""
    step = words.shape[0] // SAMPLES
    for i in range(SAMPLES):
        scratch[i] = np.uint32(words[i * step] & _MAGNITUDE_WORD)
    share = k / words.shape[0]
    expected, off = SAMPLES * share, 4.0 * np.sqrt(SAMPLES * share * (1.0 - share)) + 1.0
    low, high = threshold, np.int64(peak)
    if expected + off < SAMPLES:
        low, _ = _kth(scratch[:SAMPLES], np.int64(expected + off), threshold, peak, counts, 4)
    if expected - off >= 1.0:
        high, _ = _kth(scratch[:SAMPLES], np.int64(expected - off), threshold, peak, counts, 4)
    return low, min(high + 1, np.int64(peak))


@helper
def _between(words: Any, k: Any, threshold: Any, peak: Any, scratch: Any, counts: Any) -> Any:
    """Do what `_least` does for so many words that it is worth to guess first; return (-1, 0) if the guess was wrong."""
    low, high = _sampled(words, k, threshold, peak, scratch, counts)
    above: Any = 0
    for i in range(words.shape[0]):
        above += np.int64(np.int64(words[i] & _MAGNITUDE_WORD) > high)
    inside = _within(words, low, high, scratch)
    if not above < k <= above + inside:
        return np.int64(-1), np.int64(0)
    return _kth(scratch[:inside], k - above, low, high, counts, 4)


@helper
def _counted(words: Any, k: Any, threshold: Any, peak: Any, scratch: Any, counts: Any) -> Any:
    """Do what `_kth` does for more than k words that all reach the threshold, reading them only twice."""
    width = np.int64(peak) - threshold
    shift = np.int64(0)
    while (width >> shift) >= BINS:
        shift += 1
    counts[: (width >> shift) + 1] = 0
    for i in range(words.shape[0]):
        counts[(np.int64(words[i] & _MAGNITUDE_WORD) - threshold) >> shift] += 1
    place = width >> shift
    above = np.int64(0)
    while above + counts[place] < k:
        above += counts[place]
        place -= 1
    base = threshold + (place << shift)
    if above + counts[place] == k:
        return base - 1, np.int64(0)
    if shift == 0:
        return base, k - above
    last = min(base + (np.int64(1) << shift) - 1, np.int64(peak))
    inside = _within(words, base, last, scratch)
    return _kth(scratch[:inside], k - above, base, last, counts, 4)


@helper
def _least(words: Any, k: Any, threshold: Any, peak: Any, scratch: Any, counts: Any) -> Any:
    """Do what `_kth` does for more than k words that all reach the threshold."""
    if words.shape[0] >= _MANY_WORDS:
        least, ties = _between(words, k, threshold, peak, scratch, counts)
        if least >= 0:
            return least, ties
    return _counted(words, k, threshold, peak, scratch, counts)


@helper
def _keep(index: Any, words: Any, first: Any, last: Any, least: Any, into: Any) -> Any:
    """Move candidates above a magnitude from between `first` and `last` to `into`, in order; return where they end."""
    rows = (last - first) // 16
    into = keep(index, words, first, rows, np.int32(least), into)
    for i in range(first + 16 * rows, last):
        word = words[i]
        index[into], words[into] = index[i], word
        into += np.int64(np.int64(word & _MAGNITUDE_WORD) > least)
    return into


@kernel(int64(int64, int64, int64, U32, U32, U32, I32, I32))
def narrow(k: Any, threshold: Any, found: Any, index: Any, words: Any, scratch: Any, counts: Any, seen: Any) -> Any:
    """Leave the k largest of the candidates in the front of the list, in order; return how many there are.

    Args:
        k: 1 at least.
        threshold: Magnitude bits that the candidates reach.
        found: How many candidates there are.
        index: uint32[found or more], their places, rising; overwritten.
        words: uint32[found or more], their bits; overwritten.
        scratch: uint32[found + 1 or more].
        counts: int32[BINS], scratch.
        seen: int32[2], receives the largest magnitude bits of all candidates, and bits that all chosen ones reach, in general
            those of the smallest; 0 and 0 if there are none.
    """
    peak = np.uint32(0)
    for i in range(found):
        peak = max(peak, np.uint32(words[i] & _MAGNITUDE_WORD))
    seen[0] = np.int32(peak)
    if found <= k:
        smallest = peak
        for i in range(found):
            smallest = min(smallest, np.uint32(words[i] & _MAGNITUDE_WORD))
        seen[1] = np.int32(smallest)
        return found
    least, ties = _least(words[:found], k, threshold, peak, scratch, counts)
    seen[1] = np.int32(least)
    # The first ties stay, and so does what is larger, before them and behind.
    behind, left = np.int64(0), ties
    while left > 0:
        left -= np.int64(np.int64(words[behind] & _MAGNITUDE_WORD) == least)
        behind += 1
    kept = _keep(index, words, 0, behind, least - 1, 0)
    return _keep(index, words, behind, found, least, kept)


def room(elements: int) -> int:
    """Return the length of the scratch that these need for a vector."""
    return max(elements + MANY, SAMPLES)
