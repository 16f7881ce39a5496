"""The rotating codecs once more, in plain numpy; `twins.py` says what for."""

import math

import numpy as np
from quantised import hashed, join, split

__all__ = ["add", "answer", "columns_of", "decode", "decode_alike", "pack", "pack_alike", "payload_bound", "seed_of_signs"]

F32 = np.float32
WIDTH, TILE, GROUP = 16, 16384, 512
LEVELS = {
    1: [0.7978845608],
    2: [0.45278, 1.5104176],
    3: [0.2450942, 0.7560053, 1.3439093, 2.1519457],
    4: [0.128395, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896],
}
THRESHOLDS = {
    1: [],
    2: [0.9815988],
    3: [0.5005497, 1.0499573, 1.7479275],
    4: [0.2582217, 0.5224037, 0.7995498, 1.0992858, 1.4371388, 1.8435318, 2.4008034],
}


def spans(n):
    """Return (slice, rows) of each tile."""
    tiles = [slice(start, min(n, start + TILE)) for start in range(0, n, TILE)]
    return [(tile, 2 ** math.ceil(math.log2(math.ceil((tile.stop - tile.start) / WIDTH)))) for tile in tiles]


def payload_bound(level, n):
    """Return the payload's length in bytes."""
    return 8 + sum(4 * WIDTH + WIDTH * rows * int(level) // 8 for _, rows in spans(n))


def turned(y, first, seed):
    """Return a tile with its random signs."""
    words = hashed(np.arange(first // 32, first // 32 + math.ceil(y.size / 32)), seed)
    return np.where(np.unpackbits(words.view(np.uint8), bitorder="little")[: y.size].reshape(y.shape) == 1, -y, y)


def transformed(y):
    """Return the Hadamard transform of each column: sums and differences of halves, and of each of them again."""
    if len(y) == 1:
        return y
    low, high = y[: len(y) // 2], y[len(y) // 2 :]
    return np.concatenate([transformed(low + high), transformed(low - high)])


def columns(x):
    """Return the sum of each column: 1,024 lanes filled in order, then added in halves until there are sixteen."""
    rows = np.zeros((math.ceil(x.size / 1024), 1024), F32)
    rows.reshape(-1)[: x.size] = x.reshape(-1)
    lanes = np.zeros(1024, F32)
    for row in rows:
        lanes = lanes + row
    while lanes.size > WIDTH:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return lanes


def groups(rows):
    """Return the slices of a tile whose codes share bytes."""
    size = min(GROUP, WIDTH * rows)
    return [slice(start, start + size) for start in range(0, WIDTH * rows, size)]


def pack(level, v, seed):
    """Return (payload, rest) of a finished vector."""
    bits = int(level)
    sizes, codes, rest = [], [], np.zeros_like(v)
    for tile, rows in spans(v.size):
        x = np.zeros(WIDTH * rows, F32)
        x[: tile.stop - tile.start] = v[tile]
        exponent = int(np.clip(np.abs(x).max().view(np.int32) >> 23, 1, 253)) - 127
        y = transformed(turned(x.reshape(rows, WIDTH), tile.start, seed) * F32(2.0**-exponent))
        magnitude = np.abs(y)
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.minimum(F32(LEVELS[1][0]) / (columns(magnitude) * F32(1 / rows)), F32(2.0**100))
        number = np.searchsorted(np.array(THRESHOLDS[bits], F32), magnitude * inverse, side="right")
        stands_for = np.array(LEVELS[bits], F32)[number]
        size = columns(stands_for * magnitude) / columns(stands_for * stands_for) * F32(1 / rows)
        with np.errstate(over="ignore", under="ignore"):
            size = np.minimum(size * F32(2.0**exponent), F32(2.0**114 if exponent < 126 else 0))
        made = (number + np.where(np.signbit(y), 2 ** (bits - 1), 0)).astype(np.uint8).reshape(-1)
        for group in groups(rows):
            codes += [join(made[group] & 3, 2), join(made[group] >> 2, 1)] if bits == 3 else [join(made[group], bits)]
        sizes.append(size)
        rest[tile] = v[tile] - back(np.copysign(stands_for, y), size, tile, seed)
    return seed.to_bytes(8, "little") + b"".join(size.astype("<f4").tobytes() for size in sizes) + b"".join(codes), rest


def back(numbers, size, tile, seed):
    """Return what numbers stand for, rotated back."""
    with np.errstate(under="ignore"):
        return (turned(transformed(numbers), tile.start, seed) * size).reshape(-1)[: tile.stop - tile.start]


def decode(level, n, payload):
    """Return D(payload)."""
    bits, out = int(level), np.zeros(n, F32)
    seed, sizes_at, at = int.from_bytes(payload[:8], "little"), 8, 8 + 64 * len(spans(n))
    for tile, rows in spans(n):
        size, made = np.frombuffer(payload, "<f4", WIDTH, sizes_at), []
        for group in groups(rows):
            m = group.stop - group.start
            part = np.frombuffer(payload, np.uint8, m * bits // 8, at)
            made.append(split(part[: m // 4], m, 2) | split(part[m // 4 :], m, 1) << 2 if bits == 3 else split(part, m, bits))
            at += part.size
        code = np.concatenate(made).reshape(rows, WIDTH)
        stands_for = np.array(LEVELS[bits], F32)[code & (2 ** (bits - 1) - 1)]
        out[tile] = F32(0) + back(np.where(code >> (bits - 1) == 1, -stands_for, stands_for), size, tile, seed)
        sizes_at += 64
    return out


# --- quic_fl: all rotate alike, round at random, and are added rotated ---------------------------------------------------------


def seed_of_signs(seed):
    """Return the half of a seed that all members share."""
    return seed & ~0xFFFFFFFF


def stand_for(code, bits):
    """Return the level of each code."""
    most = F32(2**bits - 1)
    k = F32(2) * code.astype(F32) - most
    return k / (F32(2) * most - np.abs(k))


def round_at_random(y, bits, seed, first):
    """Return (sizes, codes) of a rotated tile; of two elements that share a word of noise, one is in either half of a group."""
    top = np.abs(y).max(0)
    size = np.where((top == 0) | (top >= F32(2.0**117)), F32(0), np.maximum(top, F32(2.0**-126)))
    with np.errstate(divide="ignore"):
        z = (y * np.where(size == 0, F32(0), F32(1) / size)).reshape(-1)
    most, made = F32(2**bits - 1), []
    for group in groups(len(y)):
        m = group.stop - group.start
        word = hashed(np.arange(first + group.start, first + group.start + m // 2), seed)
        noise = (np.concatenate([word >> np.uint32(17) & 0x7FFF, word & 0x7FFF]).astype(F32) + F32(0.5)) / F32(2**15)
        part = z[group]
        lower = np.minimum(most * (part / (F32(1) + np.abs(part))) + most / F32(2), most - 1).astype(np.int32)
        below, above = stand_for(lower, bits), stand_for(lower + 1, bits)
        made.append((lower + (part - below > noise * (above - below))).astype(np.uint8))
    return size, np.concatenate(made)


def columns_of(level, n, payload):
    """Return what the codes of each tile stand for, rotated as they are: (slice, sizes, levels as float32[rows, 16])."""
    bits, sizes_at, at, tiles = int(level), 8, 8 + 64 * len(spans(n)), []
    for tile, rows in spans(n):
        made = []
        for group in groups(rows):
            m = group.stop - group.start
            made.append(split(np.frombuffer(payload, np.uint8, m * bits // 8, at), m, bits))
            at += m * bits // 8
        levels = stand_for(np.concatenate(made).reshape(rows, WIDTH), bits)
        tiles.append((tile, np.frombuffer(payload, "<f4", WIDTH, sizes_at), levels))
        sizes_at += 64
    return tiles


def answer(level, tiles, signs, seed):
    """Return the payload of rotated tiles, float32[rows, 16] each."""
    sizes, codes = [], []
    for at, y in enumerate(tiles):
        size, made = round_at_random(y, int(level), seed, at * TILE)
        sizes.append(size.astype("<f4").tobytes())
        codes += [join(made[group], int(level)) for group in groups(len(y))]
    return signs.to_bytes(8, "little") + b"".join(sizes) + b"".join(codes)


def pack_alike(level, v, seed):
    """Return the payload of a finished vector."""
    signs, tiles = seed_of_signs(seed), []
    for tile, rows in spans(v.size):
        x = np.zeros(WIDTH * rows, F32)
        x[: tile.stop - tile.start] = v[tile]
        tiles.append(transformed(turned(x.reshape(rows, WIDTH), tile.start, signs) * F32(1 / rows)))
    return answer(level, tiles, signs, seed)


def decode_alike(level, n, payload):
    """Return D(payload)."""
    out, signs = np.zeros(n, F32), int.from_bytes(payload[:8], "little")
    for tile, size, levels in columns_of(level, n, payload):
        y = turned(transformed(F32(0) + size * levels), tile.start, signs)
        out[tile] = F32(0) + y.reshape(-1)[: tile.stop - tile.start]
    return out


def add(n, pushes, scale):
    """Return the rotated tiles of the mean of (weight, level, payload) triples that rotate alike."""
    total = [F32(0)] * len(spans(n))
    for weight, level, payload in pushes:
        for at, (_, size, levels) in enumerate(columns_of(level, n, payload)):
            total[at] = total[at] + (F32(weight) * size) * levels
    return [y * scale for y in total]
