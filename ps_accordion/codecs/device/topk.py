"""topk on a device; `codecs/topk.py` says what it is, `entries.py` how it is done without waiting."""

from __future__ import annotations

from typing import ClassVar

from .entries import EntriesTwin

__all__ = ["TopKTwin"]


class TopKTwin(EntriesTwin):
    """The largest elements and where they are."""

    name: ClassVar[str] = "topk"
