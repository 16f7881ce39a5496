"""Levels that are kept fractions of a vector, in (0, 1]."""

from __future__ import annotations

from ..errors import CodecError

__all__ = ["check_fraction"]


def check_fraction(codec: str, level: float) -> None:
    """Raise `CodecError` unless `level` is in (0, 1]."""
    if not 0.0 < level <= 1.0:
        raise CodecError(f"{codec}: expected a level in (0, 1] (the fraction that is kept), got {level!r}")
