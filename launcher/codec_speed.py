"""How fast codecs are and what they lose: every operation of the contract, timed beside a plain copy of the same vector.

Buffers are made once and used again, as workers and shards do. A time is the median of several calls. The copy that it is divided
by is `numpy.copyto`, timed in turn with it: how fast memory is may change within a second. With several threads, each has a
vector of its own, as each has a key in training; a time is then that of a round in which every thread has done one call, and
the copy is timed once, before they start.
"""

from __future__ import annotations

import functools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ps_accordion import codecs
from ps_accordion.codecs import Codec, Coding, Encoded, Payload, Push, kernels, registry
from ps_accordion.codecs.cache import goes_past
from ps_accordion.codecs.kernels.hadamard import TILE
from ps_accordion.codecs.packing import ONE
from ps_accordion.codecs.values import ValueFormat
from ps_accordion.codecs.workspace import zeros
from ps_accordion.cores import keep_apart
from ps_accordion.errors import CodecError

__all__ = [
    "DISTRIBUTIONS",
    "FOLDS",
    "Case",
    "Timed",
    "distribution",
    "measure",
    "measure_copy",
    "measure_kernels",
    "squared_errors",
    "timed",
]

FloatVector = NDArray[np.float32]
Call = Callable[[], object]

FOLDS: Final = (2, 4, 8)
"""Members whose payloads a fold sums."""
DISTRIBUTIONS: Final = ("gaussian", "laplace", "t3", "t2", "layered", "1% dense")
"""Kinds of vectors, from benign to heavy tails; `layered` has stretches of magnitudes from 0.01 to 1, as layers have."""
ERROR_ELEMENTS: Final = 1 << 20
"""Elements that errors are measured on at most: enough for three digits."""
TURNS: Final = 7
"""How often a copy and an operation are timed in turn."""
SECONDS: Final = 0.25 / TURNS
"""Time that calls of one operation may take in each turn, so that the whole table takes a minute and not ten."""
SECONDS_TOGETHER: Final = 0.25
"""The same with several threads, after a quarter of it that does not count: in the first tens of milliseconds they find the lock
taken more often than later."""
MOST: Final = 30
"""Calls of one operation in each turn, at most; one more before them is not counted."""
LEAST: Final = 5
"""Calls of each of several threads, at least."""
SEED: Final = 0x5EED


class Case(NamedTuple):
    """A codec by name, and a level."""

    codec: str
    level: float


class Timed(NamedTuple):
    """What is timed: the first fields of a row."""

    codec: str
    op: str
    level: float
    n: int
    threads: int


class _Bench:
    """The buffers of one thread: one vector, its residuals and its payloads.

    A residual is that of a run that has settled: what the third encoding of the vector left.
    """

    def __init__(self, codec: Codec, level: float, elements: int, thread: int) -> None:
        self.codec, self.level = codec, level
        # All begin a line of the cache, as torch's tensors do and what workers and servers make.
        self.gradient = zeros(elements)
        self.gradient[:] = distribution("gaussian", elements, seed=thread)
        self.residual, self.rest, self.total = zeros(elements), zeros(elements), zeros(elements)
        self.velocity, self.following, self.zeros = zeros(elements), zeros(elements), zeros(elements)
        self.zeros.fill(0.0)  # what nobody has written would be one page, read again and again
        self.hint = codecs.Hint()
        self.out: Payload = np.empty(codec.payload_bound(elements, level) + 4, np.uint8)
        for _ in range(3):
            encoded = self.encode_feedback()
        self.coding = Coding(codec.name, level, elements, encoded.count, SEED if codec.shared_seed else 0)
        self.payload: Payload = self.out[: encoded.nbytes].copy()
        self.reply = np.empty_like(self.out)
        self.pushes = [Push(1.0, self.coding, self.payload.copy()) for _ in range(max(FOLDS))]
        self.codec = codec.following(self.payload, self.coding)

    def encode(self) -> Encoded:
        return self._done(self.codec.encode(self.gradient, None, level=self.level, seed=SEED, out=self.out, hint=self.hint))

    def encode_turned(self) -> Encoded:
        """Do that after a result, from which a codec of whole tensors goes on with the other half of its work."""
        codec = self.codec
        try:
            self.codec = codec.following(self.answer, self.coding)
            return self.encode_feedback()
        finally:
            self.codec = codec

    def encode_in_place(self) -> Encoded:
        """Encode with what is kept in the place of the residual."""
        return self._done(
            self.codec.encode(self.gradient, self.residual, level=self.level, seed=SEED, out=self.out, hint=self.hint)
        )

    def encode_feedback(self) -> Encoded:
        """Encode as workers do: what is kept goes beside the residual, and the two change places. Momentum, too, if there is."""
        momentum, gradient = np.float32(self.codec.momentum), self.gradient
        if momentum:
            kernels.momentum.advance(self.velocity, momentum, gradient, self.following)
            gradient = self.following
        encoded = self._done(
            self.codec.encode(gradient, self.residual, level=self.level, seed=SEED, out=self.out, rest=self.rest, hint=self.hint)
        )
        self.residual, self.rest = self.rest, self.residual
        if momentum:
            coding = Coding(self.codec.name, self.level, gradient.size, encoded.count, 0)
            self.codec.mask(self.out[: encoded.nbytes], coding, self.following)
            self.velocity, self.following = self.following, self.velocity
        return encoded

    def reencode(self) -> Encoded:
        """Encode as shards do. Codecs may leave `total + residual` in the place of the sum; with zeros it stays what it is."""
        return self._done(
            self.codec.reencode(
                self.total, ONE, self.zeros, self.rest, level=self.level, seed=SEED, out=self.reply, hint=self.hint
            )
        )

    def decode(self) -> None:
        self.codec.decode(self.payload, self.coding, self.total)

    def fold(self, members: int) -> None:
        codecs.sum_decoded(self.pushes[:members], self.total, codecs={self.codec.name: self.codec})

    def answer_to(self, members: int) -> Encoded:
        """Do all that a shard does with a round: sum payloads, and encode what comes of it."""
        theirs = self.pushes[:members]
        refolded = self.codec.fold(
            [push.payload for push in theirs], [push.coding for push in theirs], [ONE] * members, np.float32(1 / members),
            self.zeros if self.codec.keeps(self.level) else None, self.rest if self.codec.keeps(self.level) else None,
            level=self.level, seed=SEED, out=self.reply, scratch=self.total, hint=self.hint,
        )  # fmt: skip
        return self._done(None if refolded is None else refolded.encoded)

    def linear_sum(self) -> Encoded:
        members = max(FOLDS)
        payloads = [push.payload for push in self.pushes]
        return self._done(self.codec.sum_payloads(payloads, [ONE] * members, np.float32(1 / members), self.coding, self.reply))

    def _done(self, encoded: Encoded | None) -> Encoded:
        assert encoded is not None, "a vector that is finite has been found not to be"
        return encoded

    def operations(self) -> Iterator[tuple[str, Call]]:
        """Return what this codec can do, by name. Before the first call of `reencode`, `total` holds a sum."""
        try:
            self.encode()
        except CodecError:
            pass  # it insists on a residual
        else:
            yield "encode", self.encode
        yield "encode_feedback", self.encode_feedback
        if self.codec.scope == "tensor":
            self.linear_sum()
            self.answer: Payload = self.reply[: self.payload.size].copy()
            yield "encode_turned", self.encode_turned
        yield "encode_in_place", self.encode_in_place
        np.copyto(self.total, self.gradient)
        yield "reencode", self.reencode
        yield "decode", self.decode
        for members in FOLDS:
            yield f"fold{members}", functools.partial(self.fold, members)
        yield f"answer{max(FOLDS)}", functools.partial(self.answer_to, max(FOLDS))
        if self.codec.linear:
            yield f"linear_sum{max(FOLDS)}", self.linear_sum


def measure(case: Case, elements: int, threads: int = 1, *, values: ValueFormat = "fp16") -> Iterator[dict[str, Any]]:
    """Time every operation of a codec at a level.

    Args:
        case: Codec and level.
        elements: Length of the vectors.
        threads: How many work at once, each on vectors of its own.
        values: How the values of sparse codecs are written.

    Yields:
        A row an operation: codec, op, level, n, threads, ms, gbps (bytes of the input vectors), vs_memcpy (time over that of a
        copy of one vector), bytes_per_element (of the bound), and sq_error by distribution.

    Raises:
        CodecError: There is no such codec, or it has no such level.
    """
    codec = registry.find(codecs.suite(values=values), case.codec)
    codec.check_level(case.level)
    errors = squared_errors(codec, case.level, min(elements, ERROR_ELEMENTS))
    benches = [_Bench(codec, case.level, elements, thread) for thread in range(threads)]
    for together in zip(*(bench.operations() for bench in benches), strict=True):
        what = Timed(case.codec, together[0][0], case.level, elements, threads)
        yield timed(what, [call for _, call in together], benches[0].gradient) | {
            "bytes_per_element": round(codec.payload_bound(elements, case.level) / elements, 5),
            "sq_error": errors,
        }


def measure_kernels(elements: int, threads: int = 1) -> Iterator[dict[str, Any]]:
    """Time three loops that codecs are made of, as `measure` times operations of codecs; `codec` is `kernels`, and level 0.

    `read` looks at the sum of two vectors, and writes nothing: what is faster has not read a gradient and a residual. `sum` is a
    plain loop that adds two vectors into a third, past the cache: a codec with feedback reads as much, and writes as much, the
    next residual. `rotate` is a Hadamard transform of columns of 1,024, at random signs.
    """
    loops = [_loops(elements, thread) for thread in range(threads)]
    for name, calls in {name: [own[name] for own in loops] for name in loops[0]}.items():
        yield timed(Timed("kernels", name, 0.0, elements, threads), calls, np.ones(elements, np.float32))


def _loops(elements: int, seed: int) -> dict[str, Call]:
    a, b, out = (zeros(elements) for _ in range(3))
    a[:], b[:] = distribution("gaussian", elements, seed), distribution("gaussian", elements, seed + 1)
    row, whole, past = zeros(kernels.vector.ROW), elements // TILE * TILE, goes_past(elements)
    work = zeros(kernels.hadamard.ROOM + kernels.hadamard.WIDTH)
    return {
        "read": lambda: kernels.vector.peak_of_sum(a, b),
        "sum": lambda: kernels.vector.sum_past(a, ONE, b, row, past, out),
        "rotate": lambda: kernels.hadamard.rotate(a[:whole], 1, 2, work, past, out[:whole]),
    }


def timed(what: Timed, calls: list[Call], source: FloatVector) -> dict[str, Any]:
    """Time calls, each on a thread of its own where there are several, and copies of a vector.

    Returns:
        The fields of `what`, ms, gbps (bytes of the input vectors), vs_memcpy (time over that of a copy; with one
        thread the median of that over all turns).
    """
    copy = functools.partial(np.copyto, np.empty_like(source), source)
    seconds, multiple = _in_turn(calls[0], copy) if len(calls) == 1 else _together(calls, copy)
    return what._asdict() | {
        "ms": round(1e3 * seconds, 4),
        "gbps": round(4e-9 * what.n * what.threads / seconds, 2),
        "vs_memcpy": round(multiple, 3),
    }


def measure_copy(elements: int = 1 << 24) -> dict[str, Any]:
    """Time a copy of a vector that no cache holds; return a row of op `copy` with n and ms."""
    source, target = np.ones(elements, np.float32), np.ones(elements, np.float32)
    times = [seconds for _ in range(TURNS) for seconds in _times(lambda: np.copyto(target, source))]
    return {"op": "copy", "n": elements, "ms": round(1e3 * statistics.median(times), 4)}


def squared_errors(codec: Codec, level: float, elements: int) -> dict[str, float]:
    """Return ||v - D(C(v))||^2 / ||v||^2, without a residual before, of a vector of each distribution."""
    errors = {}
    for name in DISTRIBUTIONS:
        v = distribution(name, elements)
        out = np.empty(codec.payload_bound(elements, level) + 4, np.uint8)
        encoded = codec.encode(v, np.zeros_like(v), level=level, seed=SEED, out=out)
        assert encoded is not None
        coding = Coding(codec.name, level, elements, encoded.count, SEED if codec.shared_seed else 0)
        decoded = np.empty_like(v)
        codec.decode(out[: encoded.nbytes], coding, decoded)
        lost, whole = (float(np.square(x, dtype=np.float64).sum()) for x in (v - decoded, v))
        errors[name] = float(f"{lost / whole:.4g}") if whole else 0.0
    return errors


def distribution(name: str, elements: int, seed: int = 0) -> FloatVector:
    """Return float32[elements] drawn from one of `DISTRIBUTIONS`, scaled as it comes."""
    rng = np.random.default_rng((seed, 1 + DISTRIBUTIONS.index(name)))
    if name == "laplace":
        return rng.laplace(size=elements).astype(np.float32)
    if name in ("t3", "t2"):
        return rng.standard_t(int(name[1]), elements).astype(np.float32)
    v = rng.standard_normal(elements, np.float32)
    if name == "layered":
        v *= np.repeat(np.geomspace(0.01, 1.0, 16, dtype=np.float32), -(-elements // 16))[:elements]
    elif name == "1% dense":
        v *= rng.random(elements, np.float32) < 0.01
    return v


def _in_turn(call: Call, copy: Call) -> tuple[float, float]:
    """Return the median time of a call, in seconds, and the median over all turns of how many copies that is."""
    times, multiples = list[float](), list[float]()
    for _ in range(TURNS):
        copies, mine = _times(copy), _times(call)
        times += mine
        multiples.append(statistics.median(mine) / statistics.median(copies))
    return statistics.median(times), statistics.median(multiples)


def _together(calls: list[Call], copy: Call) -> tuple[float, float]:
    """Return the time in seconds in which all calls are done, each on a thread of its own, and how many copies that is."""
    # A call is too short to start them together each time: each does many, and the whole is divided. Each thread has cores of its
    # own, as a worker's codec threads have.
    copies, alone = statistics.median(_times(copy)), statistics.median(_times(calls[0]))
    repeats = max(LEAST, round(SECONDS_TOGETHER / alone))
    ready, times = threading.Barrier(len(calls)), list[float]()

    def work(index: int, call: Call) -> None:
        keep_apart(index, len(calls))
        for _ in range(1 + repeats // 4):
            call()
        ready.wait()
        times.append(time.perf_counter())
        for _ in range(repeats):
            call()
        times.append(time.perf_counter())

    workers = [threading.Thread(target=work, args=(index, call)) for index, call in enumerate(calls)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = (max(times) - min(times)) / repeats
    return seconds, seconds / copies


def _times(call: Call) -> list[float]:
    """Return the times of several calls in a row, in seconds; the first, which finds the cache full of other things, is none."""
    call()
    times: list[float] = []
    while not times or (len(times) < MOST and sum(times) < SECONDS):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return times
