"""Feed mutated payloads to decoders compiled with bounds checks; run by test_hostile.py in a process of its own.

    hostile.py TRIES CODEC...

Prints, a codec, how many mutants were refused and how many were accepted and decoded. Any other outcome ends it with a traceback.
"""

import json
import sys

import numpy as np

from ps_accordion.codecs import Coding, get
from ps_accordion.codecs.kernels import sparse
from ps_accordion.errors import PayloadError

LEVELS = (0.0, -1.0, 1e-320, 0.5, 1.0, 2.0, 16.0, 32.0, 1e300, float("nan"), float("inf"))
LEVELS_OF = {
    "bf16": (16,),
    "dense": (32, 16),
    "dgc": (0.02,),
    "eden": (1, 3),
    "int": (8, 2),
    "natural": (8,),
    "onebit": (512,),
    "powersgd": (1, 6),
    "qsgd": (4,),
    "quic_fl": (8, 2),
    "random_block": (0.1,),
    "random_k": (0.1,),
    "signsgd": (2.0**-10,),
    "terngrad": (2,),
    "threshold": (1.5,),
    "topk": (0.02, 0.5),
}
FORMATS = ("fp16", "fp32", "int8", "packed")
"""Of values, where a codec has them: each takes its share of the mutants."""
COUNTS = (-1, 0, 1, 2, 3, 65_535, 65_536, 1 << 31, 1 << 63)


def bounds_are_checked():
    """Write outside an array on purpose: without this, the whole test would prove nothing."""
    try:
        sparse.put(np.ones(1, np.float32), np.full(1, 9, np.uint32), np.zeros(3, np.float32))
    except IndexError:
        return True
    return False


def mutate(rng, payload, coding):
    """Return a payload and a header with one to three things wrong, sometimes none that matters."""
    payload = payload.copy()
    for _ in range(rng.integers(1, 4)):
        kind = rng.integers(8)
        if kind == 0 and payload.size:
            payload[rng.integers(payload.size)] = rng.integers(256)
        elif kind == 1 and payload.size:
            payload[rng.integers(payload.size)] ^= 1 << rng.integers(8)
        elif kind == 2:
            payload = payload[: rng.integers(payload.size + 1)]
        elif kind == 3:
            payload = np.concatenate([payload, rng.integers(0, 256, rng.integers(1, 9), np.uint8)])
        elif kind == 4 and payload.size > 8:
            at = rng.integers(payload.size - 8)
            payload[at : at + 8] = rng.choice([0, 255, 0x7F, 0x80])
        elif kind == 5:
            coding = coding._replace(count=int(rng.choice(COUNTS)) if rng.random() < 0.5 else coding.count + 1)
        elif kind == 6:
            coding = coding._replace(level=float(rng.choice(LEVELS)))
        elif payload.size > 4:
            a, b = rng.integers(0, payload.size // 2, 2) * 2
            payload[a : a + 2], payload[b : b + 2] = payload[b : b + 2].copy(), payload[a : a + 2].copy()
    return payload, coding


def attack(codec, level, n, tries, rng):
    """Return (refused, accepted)."""
    name = codec.name
    gradient = rng.standard_normal(n).astype(np.float32)
    out = np.empty(codec.payload_bound(n, level) + 4, np.uint8)
    encoded = codec.encode(gradient, np.zeros(n, np.float32), level=level, seed=7, out=out)
    coding = Coding(name, level, n, encoded.count, 7)
    refused = accepted = 0
    for _ in range(tries):
        payload, header = mutate(rng, out[: encoded.nbytes], coding)
        decoded, total = np.full(n, np.nan, np.float32), np.zeros(n, np.float32)
        try:
            codec.validate(payload, header)
        except PayloadError:
            refused += 1
            continue
        codec.decode(payload, header, decoded)
        codec.accumulate(payload, header, np.float32(1), total)
        if codec.momentum:
            codec.mask(payload, header, total.copy())
        assert np.isfinite(decoded).all(), (name, level, n, header)
        assert np.array_equal(decoded, total), (name, level, n, header)
        accepted += 1
    return refused, accepted


def main():
    """Attack codecs at a few lengths."""
    rng = np.random.default_rng(0)
    tries = int(sys.argv[1])
    assert bounds_are_checked()
    results = {}
    for name in sys.argv[2:]:
        levels = LEVELS_OF[name]
        made = [get(name, values=form) for form in FORMATS] if hasattr(get(name), "values") else [get(name)]
        cases = [(codec, level, n) for codec in made for level in levels for n in (1, 5, 1000, 70_000)]
        share, left = divmod(tries, len(cases))
        done = [attack(*case, share + (at < left), rng) for at, case in enumerate(cases)]
        results[name] = [sum(column) for column in zip(*done, strict=True)]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
