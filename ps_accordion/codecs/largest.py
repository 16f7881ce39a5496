"""The largest elements of a sum: the kernels of `kernels/choose.py` put together.

The k-th largest magnitude of a key hardly moves from one round to the next. So the pass that makes the sum also lists what comes
near the last one, and where that gives k candidates, which is nearly always, nothing has to be read a second time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import kernels
from .base import FloatVector, Hint
from .cache import goes_past
from .workspace import borrow

__all__ = ["Chosen", "Listing", "choose", "expected", "learn", "mix", "mix_listing", "room_for"]

ERRORS = 4
"""Candidates begin this many mean errors below where the k-th is expected: too high costs a second pass, too low a long list."""
LEAST_ERROR = 1 << 12
"""The least that is taken for the mean error, in bits: 1/2,048 of an octave of magnitude."""
MANY = 2
"""But where about this many times k elements begin: more cost as much as the second pass that they may save."""
INFINITE = 0x7F800000

Listing = tuple[NDArray[np.uint32], NDArray[np.uint32]]
"""Places and elements, as bits, of candidates."""


class Chosen(NamedTuple):
    """The largest elements of a vector.

    Attributes:
        places: uint32[at most k], rising; the thread's scratch `index`.
        values: float32[at most k], the elements; the thread's scratch `words`.
        peak: Bits of the largest magnitude.
    """

    places: NDArray[np.uint32]
    values: FloatVector
    peak: int


def mix(a: FloatVector, scale: np.float32, b: FloatVector | None, out: FloatVector, k: int, hint: Hint | None) -> Chosen | None:
    """Set `out := a * scale + b` and choose the k largest elements of it, ties going to the lowest index; never a zero.

    Args:
        a: float32[n], n below 2^32.
        scale: A factor.
        b: float32[n]; None means zero.
        out: float32[n], overwritten; may be `a` or `b`.
        k: 1 to n.
        hint: What is known from the last time, for speed only; updated.

    Returns:
        None when something in `out` is not finite.
    """
    room = room_for(out.size)
    low, found = expected(hint), 0
    if b is None:
        kernels.vector.scaled_into(a, scale, out)
    else:
        found = mix_listing(a, scale, b, out, low, room)
    return choose(out, k, hint, low, found, room)


def mix_listing(a: FloatVector, scale: np.float32, b: FloatVector, out: FloatVector, low: int, listing: Listing) -> int:
    """Set `out := a * scale + b`, list the elements that reach `low`, and return how many there are; see `mix`."""
    past = out is not a and out is not b and goes_past(out.size)
    return int(kernels.choose.mix(a, scale, b, out, past, low, *listing))


def expected(hint: Hint | None) -> int:
    """Return where candidates begin, as magnitude bits: nobody reaches it where nothing is known."""
    return hint.threshold if hint is not None and hint.threshold else kernels.choose.NOBODY


def room_for(elements: int) -> Listing:
    """Return room for a list of candidates: the thread's scratch `index` and `words`."""
    room = kernels.choose.room(elements)
    return borrow("index", room, np.uint32), borrow("words", room, np.uint32)


def choose(v: FloatVector, k: int, hint: Hint | None, low: int, found: int, listing: Listing) -> Chosen | None:
    """Choose the k largest elements of a vector of which candidates have been listed; the arguments are those of `mix`.

    Args:
        v: float32[n].
        k: 1 to n.
        hint: Updated.
        low: Magnitude bits that candidates reach.
        found: How many there are.
        listing: Their places and bits; overwritten.
    """
    index, words = listing
    scratch, counts = borrow("scratch", index.size, np.uint32), borrow("counts", kernels.choose.BINS, np.int32)
    seen = borrow("seen", 2, np.int32)
    if found < k:
        low = kernels.choose.guess(v, k, scratch, counts)
        found = kernels.choose.collect(v, low, index, words)
        if found < k and low > 1:
            low = 1
            found = kernels.choose.collect(v, low, index, words)
    kept = kernels.choose.narrow(k, low, found, index, words, scratch, counts, seen)
    peak, smallest = seen.tolist()
    if peak >= INFINITE:
        return None
    if hint is not None:
        learn(hint, smallest, low, found, k)
    return Chosen(index[:kept], words[:kept].view(np.float32), peak)


def learn(hint: Hint, smallest: int, low: int, found: int, k: int) -> None:
    """Say where candidates begin the next time: some mean errors below where the smallest is expected, as TCP waits for answers.

    Args:
        hint: To be changed.
        smallest: Magnitude bits of the smallest element that was chosen.
        low: Where the candidates began.
        found: How many there were.
        k: How many were asked for.
    """
    if hint.smallest:
        off = smallest - hint.smallest - hint.trend
        hint.trend += off // 2
        hint.error += (abs(off) - hint.error) // 4
    margin = ERRORS * max(hint.error, LEAST_ERROR)
    if found > k:
        margin = min(margin, (smallest - low) * (MANY - 1) * k // (found - k))
    # After a jump of many octets the next one is expected as well, beyond all numbers: there nobody begins.
    hint.smallest, hint.threshold = smallest, min(max(1, smallest + hint.trend - margin), INFINITE)
