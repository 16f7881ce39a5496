"""What becomes of memory that a server has done with: it stays with the server.

A payload that comes through a socket lies in memory that ZeroMQ's thread takes and a shard thread gives back. The C library hands
memory of that size on to the system, which clears every page of it when the next message comes: a thousand faults for 4 MiB. But
in the next round the server needs as much again. Processes of workers belong to their scripts, whose allocations are not ours to
change.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import Final

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_KEPT: Final = 1 << 30
"""Bytes at the end of a heap that are kept: more than a round of messages takes."""
_OWN_MAPPING: Final = 32 << 20
"""Bytes from which memory is a mapping of its own, which always goes back; glibc takes no larger number. Frames are shorter."""
_SET_BY_USER: Final = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Have the C library keep what this process frees; return whether it does.

    It does not where it is another one than glibc, and where the environment says what it is to do.
    """
    if any(name in environment for name in _SET_BY_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # In this order: the second alone would make every message a mapping of its own.
    return bool(mallopt(_MMAP_THRESHOLD, _OWN_MAPPING)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
