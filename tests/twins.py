"""Every codec and the server's fold once more, in plain numpy: short enough to be believed by reading.

Nothing here touches a kernel. The arguments are those of the package, but vectors and payloads are returned instead of filled in:
payloads are `bytes`, residuals are new arrays, and None for a residual is zeros. Payload layouts are those of `docs/codecs.md`.
A whole-system replay needs `encode_holding`, `settle`, `fold`, `decode`, `effective` and `lighter`.
"""

import math
from dataclasses import dataclass

import numpy as np
import quantised
import rotated
import thin

from ps_accordion.codecs import Coding
from ps_accordion.seeds import mix64, unmix64

CHUNK = 32768
PACKED_CHUNK = 4096
CAP = 0.125
SPARSE = ("dgc", "threshold", "topk")
SHARED = ("random_block", "random_k")
SHARED_SEED = (*SHARED, "powersgd")
F32 = np.float32


@dataclass
class Packed:
    """A payload, its entries, and what it does not carry."""

    payload: bytes
    count: int
    rest: np.ndarray


@dataclass
class Folded:
    """A result as the server sends it, and the residual it keeps."""

    coding: Coding
    payload: bytes
    new_residual: np.ndarray
    lost: float


# --- levels ------------------------------------------------------------------------------------------------------------------


def entries(codec, level, n):
    """Return how many entries a payload has at most."""
    if codec == "powersgd":
        return (thin.payload_bound(level, n) - 8) // 4
    if codec in ("bf16", "dense", "eden", "onebit", "quic_fl", "signsgd") or codec in quantised.NAMES:
        return n
    if codec in SPARSE:
        return min(n, max(1, math.ceil((CAP if codec == "threshold" else level) * n)))
    if codec == "random_k":
        return math.ceil(n / stretch(n, level))
    return min(n, max(1, round(level * n)))


def payload_bound(codec, level, n, values="fp16", rows=0):
    """Return the largest payload in bytes."""
    if codec in quantised.NAMES:
        return quantised.payload_bound(level, n)
    if codec == "powersgd":
        return thin.payload_bound(level, n, rows)
    count = entries(codec, level, n)
    if codec == "dense":
        return 4 * n if level == 32 else 4 + 2 * n
    if codec == "bf16":
        return 2 * n
    if codec in ("eden", "quic_fl"):
        return rotated.payload_bound(level, n)
    if codec == "signsgd":
        return 4 * math.ceil(n / 32)
    if codec in SPARSE and values == "packed":
        return 8 + 2 * count + 2 * math.ceil(n / PACKED_CHUNK)
    if codec in SPARSE:
        size = {"fp16": 2 * count, "fp32": 4 * count, "int8": count + count % 2}[values]
        return 4 + size + 2 * count + 2 * math.ceil(n / CHUNK)
    if codec == "onebit":
        return 4 * math.ceil(n / level) + 4 * math.ceil(n / 32)
    return 4 * count


def effective(codec, level, n, values="fp16", dense_level=16, rows=0):
    """Return the choice, or dense where that is no larger."""
    if codec != "dense" and payload_bound(codec, level, n, values, rows) >= payload_bound("dense", dense_level, n):
        return "dense", dense_level
    return codec, level


def lightest(choices, n, values="fp16", rows=0):
    """Return the choice with the largest payload; then the first name; then the larger level, or the lower threshold."""

    def order(choice):
        codec, level = choice
        return -payload_bound(codec, level, n, values, rows), codec, level if codec == "threshold" else -level

    return min(choices, key=order)


def lighter(new, old, n, values="fp16"):
    """Return whether `new` sends more than `old`."""
    return payload_bound(*new, n, values) > payload_bound(*old, n, values)


def covered(n, b, seed):
    """Return the indices of the random block."""
    return (mix64(seed) % n + np.arange(b)) % n


def stretch(n, level):
    """Return of how many elements random_k sends one."""
    return n if level * n <= 1 else max(1, round(1 / level))


def drawn(n, level, seed):
    """Return the indices of random_k."""
    m, draw = stretch(n, level), mix64(seed)
    key = mix64(draw >> 32)
    x = np.arange(math.ceil(n / m)).astype(np.uint32) ^ np.uint32(key & 0xFFFFFFFF)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15)) ^ np.uint32(key >> 32)) * np.uint32(0x846CA68B)
    x = (x ^ (x >> np.uint32(16))).astype(np.uint64)
    place = ((x * np.uint64(m) >> np.uint64(32)).astype(np.int64) + (draw & 0xFFFFFFFF)) % m
    at = np.arange(x.size) * m + place
    return at[at < n]


def turn(codec, level, n, stream, round_):
    """Return the seed of one turn of cyclic coverage."""
    if codec == "random_block":
        return unmix64((stream + round_ * entries(codec, level, n)) % n)
    return unmix64((stream & ~0xFFFFFFFF) | (round_ & 0xFFFFFFFF))


# --- one vector --------------------------------------------------------------------------------------------------------------


def halves(x, peak):
    """Return (exponent, float16 values, what they stand for) of float32 `x`, scaled so that `peak` comes into [2^14, 2^15)."""
    exponent = max(math.frexp(peak)[1] - 1 - 14, -126) if peak > 0 else 0
    scaled = np.clip(x * F32(2.0**-exponent), -32752, 32752)
    half = scaled.astype(np.float16)
    return exponent, half, half.astype(F32) * F32(2.0**exponent)


def upper_halves(v):
    """Return the bfloat16 next to each of `v`, as uint16: of the one below and the one above the nearer, or the even one."""
    below = v.view(np.uint32) >> 16
    lost = v.view(np.uint32) & 0xFFFF
    up = (lost > 0x8000) | ((lost == 0x8000) & (below & 1 == 1))
    above = np.where(below & 0x7FFF == 0x7F7F, below, below + 1)  # the largest has none above
    return np.where(up, above, below).astype("<u2")


def block_of(x, peak, values):
    """Return (bytes of a value block, what its values stand for)."""
    if values == "fp32":
        return bytes([0, 0, 0, 0]) + x.astype("<f4").tobytes(), x
    if values == "int8":
        exponent = max(math.frexp(peak)[1] - 1 - 6, -126) if peak > 0 else 0
        q = np.rint(np.clip(x * F32(2.0**-exponent), -127, 127)) + F32(0)
        codes = q.astype(np.int8).tobytes() + bytes(x.size % 2)
        return bytes([2, 0]) + exponent.to_bytes(2, "little", signed=True) + codes, q * F32(2.0**exponent)
    exponent, half, stands_for = halves(x, peak)
    return bytes([1, 0]) + exponent.to_bytes(2, "little", signed=True) + half.astype("<f2").tobytes(), stands_for


def pack_entries(v, at):
    """Return the payload of the elements `at` with a 16-bit word for each: index, exponent and sign."""
    peak = np.abs(v[at]).max(initial=0)
    unit = F32(min(max(float(peak) / 128, 2.0**-126), 2.0**120))
    borders = F32(float(unit) * math.sqrt(2)).astype(np.float64) * np.exp2(np.arange(-1.0, 7))
    size = np.abs(v[at].astype(np.float64))
    at = at[size >= max(borders[0], 2.0**-126)]
    exponent = np.searchsorted(borders[1:], np.abs(v[at].astype(np.float64)), side="right")
    rest = v.copy()
    rest[at] -= np.where(v[at] < 0, -1, 1).astype(F32) * (unit * np.exp2(exponent).astype(F32))
    words = (at % PACKED_CHUNK) | (exponent << 12) | np.where(v[at] < 0, 0x8000, 0)
    counts = np.bincount(at // PACKED_CHUNK, minlength=math.ceil(v.size / PACKED_CHUNK))
    head = bytes([3, 0, 0, 0]) + unit.astype("<f4").tobytes()
    return Packed(head + words.astype("<u2").tobytes() + counts.astype("<u2").tobytes(), at.size, rest)


def pack(codec, level, v, seed=0, values="fp16", rows=0, basis=None):
    """Encode a finished vector; None if it is not finite."""
    if not np.isfinite(v).all():
        return None
    n = v.size
    if codec in quantised.NAMES:
        payload, rest = quantised.pack(codec, level, v, seed)
        return Packed(payload, n, rest)
    if codec == "powersgd":
        return Packed(*thin.pack(level, v, seed, rows, basis))
    count = entries(codec, level, n)
    peak = float(np.abs(v).max())
    if codec == "dense" and level == 32:
        return Packed(v.astype("<f4").tobytes(), n, np.zeros(n, F32))
    if codec == "dense":
        payload, stands_for = block_of(v, peak, "fp16")
        return Packed(payload, n, v - stands_for)
    if codec == "eden":
        payload, rest = rotated.pack(level, v, seed)
        return Packed(payload, n, rest)
    if codec == "quic_fl":
        return Packed(rotated.pack_alike(level, v, seed), n, np.zeros(n, F32))
    if codec == "bf16":
        upper = upper_halves(v)
        return Packed(upper.tobytes(), n, v - (upper.astype(np.uint32) << 16).view(F32))
    if codec == "signsgd":
        coins = np.unpackbits(quantised.hashed(np.arange(math.ceil(n / 32)), seed).view(np.uint8), bitorder="little")[:n]
        negative = (v < 0) | ((v == 0) & (coins == 1))
        payload = np.packbits(negative, bitorder="little").tobytes()
        return Packed(payload + bytes(-len(payload) % 4), n, np.zeros(n, F32))
    if codec == "onebit":
        chunks = [v[start : start + int(level)] for start in range(0, n, int(level))]
        sizes = np.array([lane_sum(np.abs(chunk.astype(np.float64))) / chunk.size for chunk in chunks]).astype("<f4")
        bits = np.zeros(32 * math.ceil(n / 32), np.uint8)
        bits[:n] = v < 0
        payload = sizes.tobytes() + np.packbits(bits, bitorder="little").tobytes()
        return Packed(payload, n, v - signs(sizes, bits[:n], level))
    if codec in SHARED:
        at = covered(n, count, seed) if codec == "random_block" else drawn(n, level, seed)
        rest = v.copy()
        rest[at] = 0
        return Packed(v[at].astype("<f4").tobytes(), at.size, rest)
    by_size = np.argsort(-np.abs(v), kind="stable")[:count]
    least = F32(level) if codec == "threshold" else 2.0**-149
    at = np.sort(by_size[np.abs(v[by_size]) >= least])
    if values == "packed":
        return pack_entries(v, at)
    payload, stands_for = block_of(v[at], peak if at.size else 0, values)
    rest = v.copy()
    rest[at] = v[at] - stands_for
    in_chunks = np.bincount(at // CHUNK, minlength=math.ceil(n / CHUNK))
    return Packed(payload + (at % CHUNK).astype("<u2").tobytes() + in_chunks.astype("<u2").tobytes(), at.size, rest)


def signs(sizes, bits, level):
    """Return minus a size where a bit is set, and a size elsewhere; never -0."""
    size = np.repeat(sizes, int(level))[: bits.size]
    return np.where(bits, -size, size) + F32(0)


def read_block(block, count):
    """Return the values of a value block."""
    if block[0] == 0:
        return np.frombuffer(block, "<f4", count, 4)
    if block[0] == 2:
        return np.frombuffer(block, np.int8, count, 4) * F32(2.0 ** int.from_bytes(block[2:4], "little", signed=True))
    return np.frombuffer(block, "<f2", count, 4).astype(F32) * F32(2.0 ** int.from_bytes(block[2:4], "little", signed=True))


def decode(coding, payload):
    """Return D(payload)."""
    codec, level, n, count, seed = coding
    payload = bytes(payload)
    if codec in quantised.NAMES:
        return quantised.decode(codec, level, n, payload)
    if codec == "powersgd":
        return thin.decode(level, n, payload)
    if codec == "dense":
        return np.frombuffer(payload, "<f4").copy() if level == 32 else read_block(payload, n)
    if codec == "eden":
        return rotated.decode(level, n, payload)
    if codec == "quic_fl":
        return rotated.decode_alike(level, n, payload)
    if codec == "bf16":
        return (np.frombuffer(payload, "<u2").astype(np.uint32) << 16).view(F32)
    if codec == "signsgd":
        return np.where(np.unpackbits(np.frombuffer(payload, np.uint8), bitorder="little")[:n] == 1, -F32(level), F32(level))
    if codec == "onebit":
        chunks = math.ceil(n / level)
        bits = np.unpackbits(np.frombuffer(payload, np.uint8)[4 * chunks :], bitorder="little")[:n]
        return signs(np.frombuffer(payload, "<f4", chunks), bits, level)
    out = np.zeros(n, F32)
    if codec == "random_block":
        out[covered(n, count, seed)] = np.frombuffer(payload, "<f4")
        return out
    if codec == "random_k":
        out[drawn(n, level, seed)] = np.frombuffer(payload, "<f4")
        return out
    if payload[0] == 3:
        chunks = math.ceil(n / PACKED_CHUNK)
        in_chunks = np.frombuffer(payload, "<u2", chunks, len(payload) - 2 * chunks)
        words = np.frombuffer(payload, "<u2", count, 8).astype(np.int64)
        sizes = np.frombuffer(payload, "<f4", 1, 4) * np.exp2((words >> 12) & 7).astype(F32)
        out[np.repeat(np.arange(chunks) * PACKED_CHUNK, in_chunks) + (words & 4095)] = np.where(words >> 15, -sizes, sizes)
        return out
    chunks = math.ceil(n / CHUNK)
    in_chunks = np.frombuffer(payload, "<u2", chunks, len(payload) - 2 * chunks)
    places = np.frombuffer(payload, "<u2", count, len(payload) - 2 * chunks - 2 * count)
    out[np.repeat(np.arange(chunks) * CHUNK, in_chunks) + places] = read_block(payload, count)
    return out


# --- the worker --------------------------------------------------------------------------------------------------------------


def encode(codec, level, gradient, residual=None, *, seed=0, values="fp16", **matrix):
    """Encode `gradient + residual`."""
    with np.errstate(all="ignore"):
        v = gradient + (F32(0) if residual is None else residual)
    return pack(codec, level, v, seed, values, **matrix)


def encode_holding(codec, level, gradient, residual, held, *, seed=0, values="fp16", **matrix):
    """Encode with the held spans as zero, their residual as it was."""
    gradient, emptied = gradient.copy(), residual.copy()
    for start, length in held:
        gradient[start : start + length] = 0
        emptied[start : start + length] = 0
    packed = encode(codec, level, gradient, emptied, seed=seed, values=values, **matrix)
    if packed is not None:
        for start, length in held:
            packed.rest[start : start + length] = residual[start : start + length]
    return packed


def advance(velocity, gradient, momenta, unused=()):
    """Return (what is encoded for a gradient, the velocity it leaves before the mask); momenta are (span, momentum) pairs."""
    handed_in, following = gradient.copy(), velocity.copy()
    with np.errstate(all="ignore"):
        for (start, length), momentum in momenta:
            if (start, length) not in unused:
                here = slice(start, start + length)
                handed_in[here] = following[here] = velocity[here] * F32(momentum) + gradient[here]
    return handed_in, following


# --- the residual at a switch ------------------------------------------------------------------------------------------------


def lane_sum(x):
    """Return the sum of float64 `x`: 64 lanes filled in order, then added pairwise."""
    rows = np.zeros((math.ceil(x.size / 64), 64))
    rows.reshape(-1)[: x.size] = x
    lanes = np.zeros(64)
    for row in rows:
        lanes = lanes + row
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return lanes[0]


def norm(x):
    """Return the L2 norm."""
    return math.sqrt(lane_sum(np.square(x, dtype=np.float64)))


def settle(rule, residual, reference, scale=1.0):
    """Return (residual after the switch, norm of what is thrown away)."""
    if rule == "reset":
        return np.zeros_like(residual), norm(residual)
    if rule == "clip":
        length, allowed = norm(residual), 1.0 * (scale * norm(reference))
        if math.isfinite(allowed) and length > allowed:
            after = residual * F32(allowed / length)
            return after, norm(residual.astype(np.float64) - after.astype(np.float64))
    return residual.copy(), 0.0


# --- the server --------------------------------------------------------------------------------------------------------------


def reencode(codec, level, total, scale, residual=None, *, seed=0, values="fp16", rows=0, basis=None):
    """Encode `total * scale + residual`."""
    with np.errstate(all="ignore"):
        p = total * F32(scale) + (F32(0) if residual is None else residual)
    if codec == "powersgd" and np.isfinite(p).all():
        return Packed(*thin.reencode(level, p, seed, rows, basis))
    return pack(codec, level, p, seed, values)


def fold(pushes, residual, *, elements, total_weight, seed_reply=0, values="fp16", reply=None, held=(), rule="keep", rows=0):
    """Fold (weight, coding, payload) triples in rank order; None if the result is not finite.

    A shared-seed codec's positions are those of the pushes. Linear codecs need no case of their own: adding payloads is adding
    what they stand for, where they are not zero. `quic_fl` does, where all rotate alike and nothing is left from before.
    """
    nothing = residual is None or not residual.any()
    unset, residual = residual, np.zeros(elements, F32) if residual is None else residual
    choice = reply or lightest([(coding.codec, coding.level) for _, coding, _ in pushes], elements, values, rows)
    seeds = {coding.seed for _, coding, _ in pushes if coding.codec in SHARED_SEED}
    seed = seeds.pop() if seeds else seed_reply
    scale = F32(1.0 / total_weight)
    if {coding.codec for _, coding, _ in pushes} == {"powersgd"} and (rule == "keep" or not residual.any()):
        summed = thin.summed(pushes, scale, unset)
        if summed is not None:
            return Folded(pushes[0][1], summed[0], residual if summed[1] is None else summed[1], 0.0)
    alike = {bytes(payload[:8]) for _, _, payload in pushes}
    if {choice[0], *(coding.codec for _, coding, _ in pushes)} == {"quic_fl"} and len(alike) == 1 and nothing and not held:
        with np.errstate(all="ignore"):
            tiles = rotated.add(elements, [(weight, coding.level, bytes(data)) for weight, coding, data in pushes], scale)
        if not all(np.isfinite(y).all() for y in tiles):
            return None
        payload = rotated.answer(choice[1], tiles, int.from_bytes(alike.pop(), "little"), seed)
        return Folded(Coding(*choice, elements, elements, 0), payload, np.zeros(elements, F32), 0.0)
    total = np.zeros(elements, F32)
    with np.errstate(all="ignore"):
        for weight, coding, payload in pushes:
            total = total + F32(weight) * decode(coding, payload)
    base = residual.copy()
    for start, length in held:
        total[start : start + length] = 0
        base[start : start + length] = 0
    base, lost = settle(rule, base, total, float(scale))
    basis = (
        next((thin.basis_of(each.level, elements, sent) for _, each, sent in pushes if each[:2] == choice), None)
        if rows
        else None
    )
    packed = reencode(*choice, total, scale, base, seed=seed, values=values, rows=rows, basis=basis)
    if packed is None:
        return None
    for start, length in held:
        packed.rest[start : start + length] = residual[start : start + length]
    coding = Coding(*choice, elements, packed.count, seed if choice[0] in SHARED_SEED else 0)
    return Folded(coding, packed.payload, packed.rest, lost)
