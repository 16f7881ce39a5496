"""Codecs: float32 vectors to payloads and back, and the sums that servers make of them.

`base.py` is the contract, one file is one codec, `registry.py` knows them all, and `fold.py` is what a server does with a round.
`docs/codecs.md` has the table of codecs and the exact layout of every payload.

Nothing here imports numba but to compile kernels that are not kept yet; `warm()` makes them all ready at once.
"""

from __future__ import annotations

from .base import Changes, Codec, Coding, Encoded, FloatVector, Hint, Payload
from .fold import Folded, Push, fold, keep, sum_decoded
from .holding import Held, encode_holding
from .norms import norm
from .registry import Choice, Codecs, effective, get, lightest, names, suite
from .switch import RULES, Rule, lighter, settle
from .warm import warm

__all__ = [
    "RULES",
    "Changes",
    "Choice",
    "Codec",
    "Codecs",
    "Coding",
    "Encoded",
    "FloatVector",
    "Folded",
    "Held",
    "Hint",
    "Payload",
    "Push",
    "Rule",
    "effective",
    "encode_holding",
    "fold",
    "get",
    "keep",
    "lighter",
    "lightest",
    "names",
    "norm",
    "settle",
    "suite",
    "sum_decoded",
    "warm",
]
