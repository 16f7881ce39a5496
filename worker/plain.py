"""Values that JSON can carry, for state that is no tensor: numbers, texts, None, and lists, tuples and dicts of them.

Keys of a dict may be numbers. What comes back takes the types of what stands in its place: a list becomes the tuple that it was,
a dict the Counter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["is_plain", "merged", "packed"]

PLAIN = (bool, int, float, str, type(None))
PAIRS = "*pairs*"
"""Marks a dict whose keys are no strings."""


def is_plain(value: Any) -> bool:
    """Say whether `packed` keeps all of a value."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, PLAIN) and is_plain(entry) for key, entry in value.items())
    return isinstance(value, (*PLAIN, np.generic))


def packed(value: Any) -> Any:
    """Return a value as JSON can carry it; entries of dicts that it cannot carry are left out."""
    if isinstance(value, list | tuple):
        return [packed(entry) for entry in value]
    if isinstance(value, Mapping):
        entries = {key: entry for key, entry in value.items() if isinstance(key, PLAIN) and _can_be_packed(entry)}
        if all(isinstance(key, str) for key in entries):
            return {key: packed(entry) for key, entry in entries.items()}
        return {PAIRS: [[key, packed(entry)] for key, entry in entries.items()]}
    return value.item() if isinstance(value, np.generic) else value


def _can_be_packed(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_can_be_packed, value))
    return isinstance(value, Mapping) or is_plain(value)


def merged(mine: Any, theirs: Any) -> Any:
    """Return what was packed elsewhere, with the types of `mine` and those of its entries that did not travel."""
    if isinstance(theirs, dict) and PAIRS in theirs:
        theirs = dict(theirs[PAIRS])
    if isinstance(theirs, dict):
        old = mine if isinstance(mine, Mapping) else {}
        entries = {key: merged(old.get(key), entry) for key, entry in theirs.items()}
        kept = {key: entry for key, entry in old.items() if key not in entries and not is_plain(entry)}
        return type(mine)(kept | entries) if isinstance(mine, dict) else kept | entries
    if isinstance(theirs, list):
        items = list(mine) if isinstance(mine, list | tuple) and len(mine) == len(theirs) else [None] * len(theirs)
        both = [merged(one, other) for one, other in zip(items, theirs, strict=True)]
        return tuple(both) if isinstance(mine, tuple) else both
    return theirs
