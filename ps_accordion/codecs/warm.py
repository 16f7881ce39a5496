"""Make the first step of training an ordinary one: compile and run beforehand what it will call."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from . import kernels
from .base import Codec, Coding, Payload
from .fold import Push, fold
from .registry import DEFAULT
from .switch import settle

__all__ = ["warm"]

_LEVELS = {
    "bf16": (16.0,),
    "dense": (32.0, 16.0),
    "dgc": (0.5,),
    "eden": (4.0, 1.0),
    "int": (8.0, 4.0),
    "natural": (8.0,),
    "onebit": (64.0,),
    "powersgd": (2.0,),
    "qsgd": (8.0, 4.0),
    "quic_fl": (8.0, 4.0),
    "random_block": (0.5,),
    "random_k": (0.5,),
    "signsgd": (2.0**-10,),
    "terngrad": (2.0,),
    "threshold": (0.5,),
    "topk": (0.5,),
}


def warm(codecs: Iterable[tuple[Codec, float]] | None = None) -> None:
    """Compile the kernels of codecs (or load them) and run each once. Some seconds without a cache, else under one.

    Args:
        codecs: Codecs and levels to run; None takes all of ours, and whatever options they have.
    """
    if codecs is None:
        kernels.warm()
        codecs = [(codec, level) for name, codec in DEFAULT.items() for level in _LEVELS[name]]
    codecs = list(codecs)
    kernels.warm(frozenset().union(*(codec.libraries() for codec, _ in codecs)))
    for codec, level in codecs:
        _run(codec, level)


def _run(codec: Codec, level: float) -> None:
    n = 256
    gradient = np.linspace(-1.0, 1.0, n, dtype=np.float32)
    scratch, residual = np.empty(n, np.float32), np.zeros(n, np.float32)
    out: Payload = np.empty(codec.payload_bound(n, level) + 4, np.uint8)
    encoded = codec.encode(gradient, residual, level=level, seed=1, out=out)
    assert encoded is not None
    coding = Coding(codec.name, level, n, encoded.count, 1)
    # As it comes from a socket: read-only.
    payload = np.frombuffer(out[: encoded.nbytes].tobytes(), np.uint8)
    codec.validate(payload, coding)
    codec.decode(payload, coding, scratch)
    if codec.momentum:
        kernels.momentum.advance(scratch, np.float32(codec.momentum), gradient, np.empty_like(scratch))
        codec.mask(payload, coding, scratch)
    pushes, reply = [Push(1.0, coding, payload)] * 2, np.empty_like(out)
    for base in (None, residual):
        fold(
            pushes, base, np.empty_like(residual), elements=n, total_weight=2.0, seed_reply=1, scratch=scratch, out=reply,
            codecs={codec.name: codec},
        )  # fmt: skip
    settle("clip", residual, np.zeros(n, np.float32))
