"""Which vectors are written past the cache, to memory at once.

A write through the cache reads the line from memory first, if it is not there, and pushes out another. Where a process goes round
by round through more than the cache holds, that is in vain: nobody finds there what was written. Where all that it goes through
stays in the cache, to go past it is what costs: 10 to 20 us for 262,144 elements, of 40.

So it depends on the length of a vector, and on that of the model that it is a part of.
"""

from __future__ import annotations

from typing import Final

__all__ = ["goes_past", "meet"]

LONG: Final = 1 << 17
"""Vectors of a large model go past the cache from this length on: 512 KiB are a good part of what a core has to itself."""
LONGER: Final = 1 << 19
"""Other vectors go past it from this length on."""
LARGE: Final = 1 << 21
"""Elements of a large model. A process of a job has a gradient and two residuals of it, and all on one host share a cache."""

_from = LONGER


def meet(elements: int) -> None:
    """Note that this process works on a model of so many elements, from now on. The bits are the same; only the time is not."""
    global _from
    if elements >= LARGE:
        _from = LONG


def goes_past(elements: int) -> bool:
    """Return whether a vector of so many elements is to be written past the cache."""
    return elements >= _from
