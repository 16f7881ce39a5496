"""dgc on a device: the payload of `topk`; `parcel.py` masks, and `worker/velocity.py` keeps the momentum."""

from __future__ import annotations

from typing import ClassVar

from .entries import EntriesTwin

__all__ = ["DGCTwin"]


class DGCTwin(EntriesTwin):
    """The largest elements of accumulated momentum, and where they are."""

    name: ClassVar[str] = "dgc"
