"""random_k: elements at random places that all members draw alike (with feedback: Stich, Cordonnier and Jaggi, 2018).

No selection and no indices (`codecs/covering.py`). The vector is cut into stretches of m elements, and one is sent of each:

    m = min(n, max(1, round(1 / level)))           (to nearest, ties to even; n where level * n <= 1)
    place in stretch i = (floor(hash(i) * m / 2^32) + turn) mod m
    turn = draw mod 2^32    hash: 32 bits, keyed by floor(draw / 2^32)
    cyclic: draw = floor(stream / 2^32) * 2^32 + round mod 2^32

So places rise, none comes twice, and drawing one takes a hash, wherever it is: no permutation of n is made.

The distribution: each element is sent with probability 1 / m, to m / 2^32 of it; exactly one of each stretch, independent of the
others. The last stretch may be shorter, r = n mod m elements: it sends one with probability r / m. That is what a vector needs:
E||v - D||^2 = (1 - 1/m) ||v||^2, as with a subset drawn from all of them; the difference is that two elements of a stretch never
go together. With cyclic coverage any m rounds in a row send every element exactly once.

Payload: the covered elements as little-endian float32, in order of index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..seeds import mix64, unmix64
from . import kernels
from .base import Coding, Encoded, FloatVector, Payload
from .covering import CoveringCodec
from .noise import noise_key
from .packing import INFINITE
from .workspace import borrow

__all__ = ["Draw", "RandomK", "draw_of"]


class Draw(NamedTuple):
    """What a seed says.

    Attributes:
        key: Keys the hash.
        turn: What is added to every place, below m.
    """

    key: int
    turn: int


@dataclass(frozen=True)
class RandomK(CoveringCodec):
    """One shared random element of each stretch. Level: the fraction that is sent, in (0, 1], rounded to one over a number."""

    name: ClassVar[str] = "random_k"

    def libraries(self) -> frozenset[str]:
        """Return the modules of `kernels` that it runs; see `Codec.libraries`."""
        return super().libraries() | {"places", "sparse"}

    def stretch(self, elements: int, level: float) -> int:
        """Return m: the elements of which one is sent."""
        self.check_level(level)
        return max(1, elements) if level * elements <= 1.0 else max(1, round(1.0 / level))

    def length(self, elements: int, level: float) -> int:
        """Return how many stretches there are."""
        return -(-elements // self.stretch(elements, level))

    def covered(self, elements: int, level: float, seed: int) -> int:
        """Return how many stretches there are, but for the last one if it is shorter and its place lies behind its end."""
        whole, left = divmod(elements, self.stretch(elements, level))
        return whole + (self._places(elements, level, seed, whole, 1).size if left else 0)

    def seed_of_turn(self, elements: int, level: float, *, stream: int, turn: int) -> int:
        """Return the seed with the key of a stream and this turn; see `CoveringCodec.seed_of_turn`."""
        return unmix64(stream >> 32 << 32 | turn & 0xFFFFFFFF)

    def send(self, v: FloatVector, *, level: float, seed: int, out: Payload) -> Encoded:
        """Move the elements of `v` that `seed` names to `out`; see `CoveringCodec.send`."""
        places = self._all_places(v.size, level, seed)
        count = places.size
        kernels.places.take(places, out[: 4 * count].view(np.float32), v)
        return Encoded(4 * count, count)

    def decode(self, payload: Payload, coding: Coding, out: FloatVector) -> None:
        """Write the values to their places in `out`, and zero elsewhere."""
        kernels.vector.clear(out)
        kernels.sparse.put(payload.view(np.float32), self._all_places(coding.elements, coding.level, coding.seed), out)

    def peek(self, payload: Payload, coding: Coding, start: int, out: FloatVector) -> None:
        """Write what is covered of some elements to `out`, and zero elsewhere: only their stretches are drawn."""
        out.fill(0.0)
        m, end = self.stretch(coding.elements, coding.level), start + out.size
        first, last = start // m, -(-end // m)
        places = self._places(coding.elements, coding.level, coding.seed, first, last - first)
        inside = (places >= start) & (places < end)
        out[places[inside] - np.uint32(start)] = payload.view(np.float32)[first : first + places.size][inside]

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Add `weight` times the values at their places in `total`."""
        places = self._all_places(coding.elements, coding.level, coding.seed)
        kernels.places.add(payload.view(np.float32), places, weight, total)

    def release(self, residual: FloatVector, coding: Coding, payload: Payload, new_residual: FloatVector) -> bool:
        """Add the covered elements of a residual to summed values and clear them; see `Codec.release`."""
        values = payload[: 4 * coding.count].view(np.float32)
        places = self._all_places(coding.elements, coding.level, coding.seed)
        np.copyto(new_residual, residual)
        values += residual[places]
        new_residual[places] = 0.0
        return int(kernels.vector.peak(values)) < INFINITE

    def _all_places(self, elements: int, level: float, seed: int) -> NDArray[np.uint32]:
        return self._places(elements, level, seed, 0, self.length(elements, level))

    def _places(self, elements: int, level: float, seed: int, first: int, count: int) -> NDArray[np.uint32]:
        """Return the places of `count` stretches from `first` on, as far as they are below `elements`: the thread's scratch."""
        m = self.stretch(elements, level)
        key, turn = draw_of(seed, m)
        low, high = noise_key(key)
        places = borrow("index", count, np.uint32)
        return places[: kernels.places.draw(first, m, low, high, turn, elements, places)]


def draw_of(seed: int, stretch: int) -> Draw:
    """Return what a seed says for stretches of so many elements."""
    draw = mix64(seed)
    return Draw(draw >> 32, (draw & 0xFFFFFFFF) % stretch)
