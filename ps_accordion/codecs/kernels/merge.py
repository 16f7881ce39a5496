"""Add sparse vectors to a dense one, and choose among the result, a chunk at a time and without a dense sum.

What the members of a round sent is a few elements in a hundred, so their sum is zero nearly everywhere, and the new residual is
the old one but for those places. Where the other half of a double buffer is known to differ from this one in a few places, too,
it takes less to bring it up to date than to write it anew.

A chunk of the sum is kept in scratch memory that is -0.0 where nothing has been added: no sum that begins at zero is ever that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import F32, F32_IN, I32, U16_IN, U32, U32_IN, bits, fetch, float32, helper, int64, kernel, mask64
from .choose import FEW, append, append_rest
from .sparse import CHUNK_SHIFT

__all__ = ["ANEW", "COPY", "UPDATE", "merge"]

UPDATE, COPY, ANEW = 0, 1, 2
"""What the target holds at first: all but what has changed, anything, or anything where what is added to is zero."""

_CHUNK = 1 << CHUNK_SHIFT
_LINE = 16  # elements of a line of the cache
_ZERO = np.float32(0.0)
_MINUS_ZERO = np.float32(-0.0)
_SIGN = np.int32(-(2**31))


@helper
def _add(values: Any, places: Any, first: Any, last: Any, weight: Any, total: Any, base: Any, touched: Any, found: Any) -> Any:
    """Add a member's entries of one chunk to `total`; append places that nothing had been added to. Return their number then."""
    for j in range(first, last):
        place = np.int64(places[j])
        before = total[place]
        new = bits(before) == _SIGN
        touched[found] = np.uint32(base + place)
        found += np.int64(new)
        total[place] = (_ZERO if new else before) + weight * values[j]
    return found


@helper
def _settle(touched: Any, first: Any, last: Any, base: Any, scale: Any, total: Any, a: Any, out: Any, sums: Any) -> Any:
    """Set `out := total * scale + a` at the places of one chunk; return whether that gave -0.0 anywhere. Clears the total."""
    odd = np.int64(0)
    for j in range(first, last):
        at = np.int64(touched[j])
        value = total[at - base] * scale + a[at]
        total[at - base] = _MINUS_ZERO
        out[at] = value
        sums[j] = value
        odd |= np.int64(bits(value) == _SIGN)
    return odd


@helper
def _renew(places: Any, values: Any, first: Any, last: Any, end: Any, out: Any) -> Any:
    """Write values to their places below `end`; return the first that is not below."""
    at = first
    while at < last and np.int64(places[at]) < end:
        out[np.int64(places[at])] = values[at]
        at += 1
    return at


@helper
def _copy(a: Any, first: Any, last: Any, out: Any) -> Any:
    """Set `out := 0 + a`; return whether there was a -0.0, which that takes away."""
    odd = np.int32(0)
    for i in range(first, last):
        odd |= np.int32(bits(a[i]) == _SIGN)
        out[i] = a[i] + _ZERO
    return np.int64(odd)


@kernel(
    int64(
        *(F32_IN, U16_IN, U16_IN, F32_IN, I32, float32),
        *(int64, F32_IN, U32_IN, F32_IN, int64),
        *(F32, F32, U32, F32, int64, U32, U32, I32),
    )
)
def merge(
    values: Any,
    places: Any,
    counts: Any,
    weights: Any,
    heads: Any,
    scale: Any,
    how: Any,
    a: Any,
    old_places: Any,
    old_values: Any,
    split: Any,
    total: Any,
    out: Any,
    touched: Any,
    sums: Any,
    threshold: Any,
    index: Any,
    words: Any,
    seen: Any,
) -> Any:
    """Set `out := (0 + weight * values + ...) * scale + a`, and list what reaches a threshold as `choose.mix` does.

    Every operation is rounded by itself, members in their order: the same bits as with a dense sum.

    Args:
        values: float32, the entries of all members, one member behind another.
        places: uint16, their places in their chunks. They have been checked.
        counts: uint16[members * chunks], entries in each chunk, a member behind another.
        weights: float32[members].
        heads: int32[members], the first entry of each; overwritten.
        scale: A factor above zero.
        how: `UPDATE`, `COPY` or `ANEW`.
        a: float32[n], n below 2^32; other memory than `out`. Read only to be copied. Zero if `ANEW`.
        old_places: uint32, where `out` differs from `a`, which have no -0.0: two lists that rise from chunk to chunk. Read only
            for `UPDATE`.
        old_values: float32, what `a` has there; where a place comes twice, the later one.
        split: Where the second list begins.
        total: float32[min(n, 32768) or more], scratch.
        out: float32[n].
        touched: uint32[entries + 1], receives where something was added, chunk by chunk.
        sums: float32[entries + 1], receives what `out` has there.
        threshold: Magnitude bits, as in `choose.mix`.
        index: uint32[room(n)], receives places.
        words: uint32[room(n)], receives elements, as bits.
        seen: int32[2], receives how many places were touched, and 1 if `a` or `out` has a -0.0 that may not be in the other.

    Returns:
        How many elements reach the threshold.
    """
    n, members = out.shape[0], weights.shape[0]
    chunks = counts.shape[0] // members
    low = np.int32(threshold)
    found, many, odd = np.int64(0), np.int64(0), np.int64(0)
    one, two = np.int64(0), split
    total[: min(n, _CHUNK)] = _MINUS_ZERO
    for chunk in range(chunks):
        base = chunk << CHUNK_SHIFT
        end = min(n, base + _CHUNK)
        if how == UPDATE:
            one = _renew(old_places, old_values, one, split, end, out)
            two = _renew(old_places, old_values, two, old_places.shape[0], end, out)
        elif how == COPY:
            odd |= _copy(a, base, end, out)
        else:
            out[base:end] = _ZERO
        before = many
        for m in range(members):
            first = np.int64(heads[m])
            last = first + np.int64(counts[m * chunks + chunk])
            many = _add(values, places, first, last, weights[m], total, base, touched, many)
            heads[m] = np.int32(last)
        if how == COPY:
            odd |= _settle(touched, before, many, base, scale, total, a, out, sums)
        else:
            odd |= _settle(touched, before, many, base, scale, total, out, out, sums)
        whole = base + (end - base) // 64 * 64
        for start in range(base, whole, 64):
            if how == UPDATE:
                # What is read here lies in the cache already, as what is changed does: the line of the next chunk is brought.
                for line in range(4):
                    fetch(out, min(start + _CHUNK + line * _LINE, n - 1))
            mask: Any = mask64(out, start, low)
            if mask != np.uint64(0):
                found = append(mask, start, out, start, index, words, found, FEW)
        if whole < end:
            found = append_rest(out, whole, low, index, words, found)
    seen[0], seen[1] = np.int32(many), np.int32(odd)
    return found
