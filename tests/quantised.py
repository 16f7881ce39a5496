"""The quantising codecs once more, in plain numpy; `twins.py` says what for."""

import math

import numpy as np

from ps_accordion.seeds import mix64

__all__ = ["NAMES", "decode", "hashed", "pack", "payload_bound"]

NAMES = ("int", "natural", "qsgd", "terngrad")
KEEPING = ("int",)
F32 = np.float32


def spans(n, bucket):
    """Return the slices of the buckets."""
    return [slice(start, min(n, start + bucket)) for start in range(0, n, bucket)]


def payload_bound(level, n, bucket=512):
    """Return the payload's length in bytes."""
    return 4 + sum(4 + math.ceil((span.stop - span.start) * level / 8) for span in spans(n, bucket))


def noise(start, m, seed):
    """Return 16 signed bits for each of the m elements of the bucket that begins at `start`: two share a hash."""
    middle = (m + 1) // 2
    x = hashed(np.arange(start, start + middle), seed)
    return np.concatenate([x >> np.uint32(16), x[: m - middle] & np.uint32(0xFFFF)]).astype(np.uint16).view(np.int16)


def hashed(places, seed):
    """Return 32 bits for each place, as uint32."""
    key = mix64(seed)
    x = (places & 0xFFFFFFFF).astype(np.uint32) ^ np.uint32(key & 0xFFFFFFFF)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15)) ^ np.uint32(key >> 32)) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def join(codes, bits):
    """Return codes of one bucket as bytes: byte j holds codes j, j + w, ..., from the lowest bits up."""
    per_byte = 8 // bits
    w = math.ceil(codes.size / per_byte)
    parts = np.zeros(w * per_byte, np.uint8)
    parts[: codes.size] = codes
    return sum(part << (bits * i) for i, part in enumerate(parts.reshape(per_byte, w))).astype(np.uint8).tobytes()


def split(part, m, bits):
    """Return m codes from the bytes of a bucket."""
    return np.concatenate([(part >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)])[:m]


def deviation(x):
    """Return the root of the mean square, in 64 lanes of float64 filled in order, then added pairwise."""
    rows = np.zeros((math.ceil(x.size / 64), 64))
    rows.reshape(-1)[: x.size] = x
    lanes = np.zeros(64)
    for row in rows:
        lanes = lanes + row * row
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return math.sqrt(lanes[0] / x.size)


def powers(x, h):
    """Return (scale, codes) of a bucket in natural codes."""
    top = int(np.abs(x).max().view(np.int32))
    unit = np.int32(min(max((top + 0x7FFFFF) >> 23, 1), 247) << 23).view(F32)
    with np.errstate(under="ignore"):
        word = (x * (F32(1) / unit)).view(np.int32)
    noise = (h.view(np.uint16).astype(np.int32) << 7) | 0x40
    exponent = np.minimum(((word & 0x7FFFFFFF) + noise) >> 23, 127)
    return unit, (exponent | np.where(word < 0, 0x80, 0)).astype(np.uint8)


def pack(codec, level, v, seed=0, bucket=512):
    """Return (payload, rest) of a finished vector."""
    bits = int(level)
    limit, half = F32(2 ** (bits - 1) - 1), 2 ** (bits - 1)
    scales, codes, rest = [], [], np.zeros_like(v)
    for span in spans(v.size, bucket):
        x = v[span]
        if codec == "natural":
            unit, made = powers(x, noise(span.start, x.size, seed))
            scales.append(unit)
            codes.append(made.tobytes())
            continue
        largest = min(np.abs(x).max(), limit * F32(2.0**120))
        if codec == "terngrad":
            largest = F32(min(float(largest), 2.5 * deviation(x)))
        unit = max(largest / limit, F32(2.0**-126))
        if codec in KEEPING:
            with np.errstate(under="ignore"):
                q = np.rint(np.clip(x * (F32(1) / unit), -limit, limit))
            rest[span] = x - (q + F32(0)) * unit
        else:
            with np.errstate(over="ignore", divide="ignore", under="ignore"):
                inverse = min(limit / F32(largest), F32(2.0**126))
                y = np.clip(x, -largest, largest) * inverse + F32(256 + half)
            u = noise(span.start, x.size, seed)
            places = y.astype(np.float64) * 2**15 + np.where(np.arange(x.size) < (x.size + 1) // 2, (u >> 1) & 0x7FFF, u & 0x7FFF)
            q = np.floor(places / 2**15) - (256 + half)
        scales.append(unit)
        codes.append(join((q + half).astype(np.uint8), bits))
    return bucket.to_bytes(4, "little") + np.array(scales, "<f4").tobytes() + b"".join(codes), rest


def decode(codec, level, n, payload):
    """Return D(payload)."""
    bits, bucket = int(level), int.from_bytes(payload[:4], "little")
    scales = np.frombuffer(payload, "<f4", math.ceil(n / bucket), 4)
    codes = np.frombuffer(payload, np.uint8, offset=4 + scales.nbytes)
    out, at = np.zeros(n, F32), 0
    for span, unit in zip(spans(n, bucket), scales, strict=True):
        m = span.stop - span.start
        w = math.ceil(m * bits / 8)
        if codec == "natural":
            exponent = codes[at : at + w] & 0x7F
            with np.errstate(under="ignore"):
                size = np.where(exponent > 0, np.exp2(exponent - 127.0), 0).astype(F32) * unit
            out[span] = F32(0) + np.where(codes[at : at + w] < 0x80, size, -size)
            at += w
            continue
        out[span] = (split(codes[at : at + w], m, bits).astype(F32) - F32(2 ** (bits - 1))) * unit
        at += w
    return out
