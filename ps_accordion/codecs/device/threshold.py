"""threshold on a device; `codecs/threshold.py` says what it is, `entries.py` how it is done without waiting.

The payload is laid out, and comes to the host, for as many entries as the cap allows: a small cap is what makes this fast.
"""

from __future__ import annotations

from typing import ClassVar

from ..threshold import bits_of
from .entries import EntriesTwin

__all__ = ["ThresholdTwin"]


class ThresholdTwin(EntriesTwin):
    """The elements that reach a threshold, and where they are."""

    name: ClassVar[str] = "threshold"

    def floor(self, level: float) -> int:
        """Return the threshold as magnitude bits."""
        return bits_of(level)
