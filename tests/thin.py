"""powersgd once more, in plain numpy: short enough to be believed by reading. `docs/codecs.md` says what is done here, and why.

A basis is a pair: 0 for a left or 1 for a right one, and its vectors, float32[rank, length].
"""

import functools
import math

import numpy as np

from ps_accordion.seeds import mix64

F32 = np.float32
LEFT, RIGHT = 0, 1


def lanes(products):
    """Return the sum of each row of [m, n]: 64 lanes filled in order, then added pairwise; in the type of the products."""
    m, n = products.shape
    padded = np.zeros((m, math.ceil(n / 64), 64), products.dtype)
    padded.reshape(m, -1)[:, :n] = products
    sums = np.zeros((m, 64), products.dtype)
    for row in range(padded.shape[1]):
        sums = sums + padded[:, row]
    while sums.shape[1] > 1:
        sums = sums[:, : sums.shape[1] // 2] + sums[:, sums.shape[1] // 2 :]
    return sums[:, 0]


def shape(n, rows=0):
    """Return rows and columns of a vector."""
    rows = rows or max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    return rows, n // rows


def payload_bound(level, n, rows=0):
    """Return the payload's length."""
    rows, columns = shape(n, rows)
    return 8 + 4 * min(int(level), rows, columns) * (rows + columns)


def across(matrix, basis):
    """Return the left factor for a right basis."""
    return np.array([lanes(matrix * vector) for vector in basis], F32)


def down(matrix, basis):
    """Return the right factor for a left basis."""
    rows = -(-len(matrix) // 4) * 4
    padded, factors = np.zeros((rows, matrix.shape[1]), F32), np.zeros((len(basis), rows), F32)
    padded[: len(matrix)], factors[:, : len(matrix)] = matrix, basis
    right = np.zeros((len(basis), matrix.shape[1]), F32)
    for i in range(0, rows, 4):
        a, b, c, d = (factors[:, i + j, None] * padded[i + j] for j in range(4))
        right = right + (((a + b) + c) + d)
    return right


def product(left, right):
    """Return the matrix that two factors stand for."""
    total = np.zeros((left.shape[1], right.shape[1]), F32)
    for one, other in zip(left, right, strict=True):
        total = total + one[:, None] * other[None, :]
    return total


@functools.cache
def drawn(seed, number, length):
    """Return a vector that all draw alike."""
    start = mix64(seed) + (number << 40)
    return np.array([(mix64(start + i) >> 11) * 2.0**-52 - 1.0 for i in range(length)])


def dot(a, b):
    """Return the product of two vectors of float64."""
    return lanes((a * b)[None, :])[0]


def orthonormal(vectors, seed):
    """Return orthonormal vectors, float32, and float64[rank, rank] by which they are mixed to what they were."""
    rank, length = vectors.shape
    done, mixing = [], np.zeros((rank, rank))

    def against(a):
        before, shares = math.sqrt(dot(a, a)), np.zeros(len(done))
        for _ in range(2):
            for k, b in enumerate(done):
                share = dot(a, b)
                shares[k] += share
                a = a - share * b
        left = math.sqrt(dot(a, a))
        return (a / left, shares, left) if left > before * 2.0**-30 else (a, shares, 0.0)

    for k in range(rank):
        a, mixing[:k, k], mixing[k, k] = against(vectors[k].astype(np.float64))
        left = mixing[k, k]
        for attempt in range(4):
            if not left:
                a, _, left = against(drawn(seed, 64 * attempt + k, length))
        done.append(a if left else np.zeros(length))
    return np.array(done).astype(F32), mixing


def tamed(matrix):
    """Return the matrix that is multiplied: a shorter one where elements are large; None where all are small."""
    peak = float(np.abs(matrix).max())
    if peak < 2.0**-96:
        return None
    return matrix if peak < 2.0**96 else matrix * F32(2.0 ** (95 - (math.frexp(peak)[1] - 1)))


def begun(level, rows, columns, seed, basis):
    """Return side and vectors of the basis of a payload."""
    rank = min(int(level), rows, columns)
    side, vectors = basis or (RIGHT, np.zeros((0, columns), F32))
    if len(vectors) >= rank:
        return side, vectors[:rank]
    more = np.zeros((rank - len(vectors), rows if side == LEFT else columns), F32)
    return side, orthonormal(np.concatenate([vectors, more]), seed)[0]


def written(rows, side, left, right):
    """Return a payload."""
    return np.array([rows, side], "<u4").tobytes() + left.astype("<f4").tobytes() + right.astype("<f4").tobytes()


def factors(level, n, payload):
    """Return (side, left, right) of a payload."""
    rows, side = np.frombuffer(payload, "<u4", 2).tolist()
    columns = n // rows
    rank = min(int(level), rows, columns)
    flat = np.frombuffer(payload, "<f4", rank * (rows + columns), 8)
    return side, flat[: rank * rows].reshape(rank, rows), flat[rank * rows :].reshape(rank, columns)


def basis_of(level, n, payload):
    """Return the basis that a payload hands on."""
    side, left, right = factors(level, n, payload)
    return side, (right if side == RIGHT else left)


def multiplied(matrix, side, basis):
    """Return (left, right) for what a matrix has along a basis."""
    return (across(matrix, basis), basis) if side == RIGHT else (basis, down(matrix, basis))


def pack(level, v, seed, rows=0, basis=None):
    """Return payload, entries and rest of a worker's encoding."""
    rows, columns = shape(v.size, rows)
    side, vectors = begun(level, rows, columns, seed, basis)
    matrix = v.reshape(rows, columns)
    short = tamed(matrix)
    left, right = multiplied(np.zeros_like(matrix) if short is None else short, side, vectors)
    rest = (matrix - product(left, right)).reshape(-1)
    return written(rows, side, left, right), len(vectors) * (rows + columns), rest


def reencode(level, p, seed, rows=0, basis=None):
    """Return the same of a server's encoding: both halves of an iteration."""
    rows, columns = shape(p.size, rows)
    side, vectors = begun(level, rows, columns, seed, basis)
    matrix = p.reshape(rows, columns)
    short = tamed(matrix)
    if short is None:
        left, right = multiplied(np.zeros_like(matrix), side, vectors)
    else:
        turned = orthonormal(multiplied(short, side, vectors)[1 - side], seed)[0]
        side = 1 - side
        left, right = multiplied(short, side, turned)
    rest = (matrix - product(left, right)).reshape(-1)
    return written(rows, side, left, right), len(vectors) * (rows + columns), rest


def decode(level, n, payload):
    """Return D(payload)."""
    _, left, right = factors(level, n, payload)
    return product(left, right).reshape(-1)


def summed(pushes, scale, residual=None):
    """Add payloads of one basis: (weight, coding, payload) triples to a payload and the residual that is left.

    None where members hold different bases.
    """
    _, coding, first = pushes[0]
    level, n, seed = coding.level, coding.elements, coding.seed
    side, left, right = factors(level, n, first)
    basis = right if side == RIGHT else left
    added, total = 1 - side, np.zeros_like(left if side == RIGHT else right)
    for weight, _, payload in pushes:
        its_side, its_left, its_right = factors(level, n, payload)
        if its_side != side or (its_right if side == RIGHT else its_left).tobytes() != basis.tobytes():
            return None
        total = total + F32(weight) * (its_left if side == RIGHT else its_right)
    total = total * scale + F32(0)
    if total.any():
        total, mixing = orthonormal(total, seed)
        mixed = np.zeros(basis.shape)
        for k in range(len(basis)):
            for m in range(k, len(basis)):
                mixed[k] = mixed[k] + mixing[k, m] * basis[m].astype(np.float64)
        basis, side = mixed.astype(F32), 1 - side
    pair = {added: total, 1 - added: basis}
    left, right = pair[LEFT], pair[RIGHT]
    rest = residual
    if residual is not None:
        matrix = residual.reshape(left.shape[1], right.shape[1])
        short = tamed(matrix)
        if short is not None:
            more_left, more_right = multiplied(short, side, right if side == RIGHT else left)
            rest = (matrix - product(more_left, more_right)).reshape(-1)
            left, right = (left + more_left, right) if side == RIGHT else (left, right + more_right)
    return written(left.shape[1], side, left, right), rest
