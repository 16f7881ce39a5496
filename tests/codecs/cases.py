"""What the codec tests share: every codec at some levels, vectors worth trying, and short calls."""

import functools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ps_accordion import codecs
from ps_accordion.codecs import Coding, get

SPARSE = ("dgc", "threshold", "topk")
"""Codecs whose values have a format."""
SEED = 0x0123_4567_89AB_CDEF


def environment(**changes):
    """Return variables for a Python process that imports the package from where this one did."""
    assert codecs.__file__
    return os.environ | {"PYTHONPATH": str(Path(codecs.__file__).parents[2])} | changes


class Case(NamedTuple):
    """A codec with its options, at a level."""

    codec: str
    level: float
    values: str = "fp16"

    def build(self):
        return get(self.codec, values=self.values) if self.codec in SPARSE else get(self.codec)

    @property
    def rounds(self):
        """Whether what is kept is a difference that is rounded, so that it adds up to a few units of the last place only."""
        return self.codec in ("eden", "onebit", "powersgd")

    def __str__(self):
        return f"{self.codec}-{self.level:g}" + (f"-{self.values}" if self.codec in SPARSE else "")


CASES = [
    Case("dense", 32),
    Case("dense", 16),
    Case("bf16", 16),
    Case("int", 8),
    Case("int", 4),
    Case("int", 2),
    Case("natural", 8),
    Case("qsgd", 8),
    Case("qsgd", 4),
    Case("qsgd", 2),
    Case("terngrad", 2),
    Case("quic_fl", 8),
    Case("quic_fl", 2),
    Case("topk", 0.01),
    Case("topk", 0.001, "fp32"),
    Case("topk", 0.3),
    Case("topk", 1.0, "fp32"),
    Case("dgc", 0.1, "int8"),
    Case("threshold", 0.5),
    Case("threshold", 2.0, "packed"),
    Case("eden", 1),
    Case("eden", 3),
    Case("onebit", 512),
    Case("onebit", 16384),
    Case("powersgd", 4),
    Case("powersgd", 6),
    Case("signsgd", 2.0**-10),
    Case("random_block", 0.01),
    Case("random_block", 0.37),
    Case("random_block", 1.0),
    Case("random_k", 0.01),
]
LENGTHS = [1, 63, 65, 1000, 8192, 10_007, 32_767, 32_768, 32_769, 1 << 18]
"""One element, the edges of 64 lanes and of a chunk, the smallest that is sampled, a prime, and the hot size."""


def gaussian(n, seed=0):
    """Return float32[n] of standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def vectors(n):
    """Return vectors of length n, by name; a few where they are long."""
    few = ("gaussian", "constant", "one hot", "wide", "every sixteenth")
    return {name: v for name, v in _vectors(n).items() if n <= 40_000 or name in few}


@functools.cache
def _vectors(n):
    rng = np.random.default_rng(n)
    one_hot = np.zeros(n, np.float32)
    one_hot[n // 2] = -3.0
    return {
        "gaussian": gaussian(n),
        "heavy tails": rng.standard_t(2, n).astype(np.float32),
        "one in a hundred": (gaussian(n, 1) * (rng.random(n) < 0.01)).astype(np.float32),
        "zero": np.zeros(n, np.float32),
        "constant": np.full(n, 0.1, np.float32),
        "two values": np.where(rng.random(n) < 0.5, 1.0, -1.0).astype(np.float32),
        "one hot": one_hot,
        "rising": np.arange(n, dtype=np.float32),
        "denormal": (rng.integers(-50, 50, n) * 2.0**-149).astype(np.float32),
        "mixed with denormals": (rng.standard_normal(n) * np.exp2(rng.integers(-149, -110, n))).astype(np.float32),
        "huge": (rng.uniform(-1, 1, n) * 3.4e38).astype(np.float32),
        "largest": np.full(n, np.finfo(np.float32).max, np.float32),
        "wide": (rng.standard_normal(n) * np.exp2(rng.integers(-60, 60, n))).astype(np.float32),
        "every sixteenth": np.where(np.arange(n) % 16 == 3, gaussian(n, 2), np.float32(1e-3)).astype(np.float32),
    }


def adds_up(case, total, v):
    """Return whether `total` is `v`: to the bit, or, where the rest is rounded, to a few units of the largest in its place."""
    if not case.rounds:
        return np.array_equal(total, v)
    few = float(np.abs(v).max()) * 2.0**-22 + 2.0**-149
    return bool((np.abs(total.astype(np.float64) - v) <= few).all())


def buffer(codec, level, n):
    """Return a payload buffer full of rubbish, one word longer than needed."""
    return np.full(codec.payload_bound(n, level) + 4, 0xA5, np.uint8)


def encode(case, gradient, residual, seed=SEED):
    """Return (coding, payload as a read-only array), or None; `residual` is updated."""
    codec = case.build()
    out = buffer(codec, case.level, gradient.size)
    encoded = codec.encode(gradient, residual, level=case.level, seed=seed, out=out)
    if encoded is None:
        return None
    assert encoded.nbytes <= codec.payload_bound(gradient.size, case.level)
    assert (out[encoded.nbytes + 4 :] == 0xA5).all()
    payload = np.frombuffer(out[: encoded.nbytes].tobytes(), np.uint8)
    return Coding(case.codec, case.level, gradient.size, encoded.count, seed if codec.shared_seed else 0), payload


def decode(case, coding, payload):
    """Validate and decode into a buffer that is not clean."""
    codec = case.build()
    codec.validate(payload, coding)
    out = np.full(coding.elements, np.nan, np.float32)
    codec.decode(payload, coding, out)
    return out
