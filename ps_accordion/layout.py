"""From a model's tensor table to keys, and from keys to shards.

A *key* is what is pushed: a partition of a large tensor, or several small tensors fused.
Everything here follows from the table, two numbers and which tensors are matrices, so that every process computes the same
layout; its digest is compared when a worker declares a model.

* A tensor with one dimension or fewer, or with fewer than `DENSE_BELOW` elements, is *small*: it goes dense, fused with its
  neighbours.
* Every other tensor is *compressible* and cut into partitions of at most `partition_elements`, and of less where a model is so
  small that it would make fewer than `SHARED_BY`; or, if its codec needs it whole, taken as a matrix and cut between rows into as
  few keys as `MATRIX_ELEMENTS` allows. (Not by the number of servers: a job may go on from a checkpoint with another.)
* Tensors are taken in reverse order of registration, which is roughly the order in which backward makes their gradients.
* Small and compressible keys are balanced over the shards separately, greedily by size, ties by number.
  Small tensors are fused into equal keys, a whole number of them a shard, so that there is something to balance with.

A table may come from a peer, so nothing here takes time or memory that its limits do not bound.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import msgpack
import xxhash

from .errors import LayoutError

__all__ = ["DENSE_BELOW", "FUSE_ELEMENTS", "MATRIX_ELEMENTS", "Key", "Layout", "Matrices", "Slice", "Tensor", "read_table"]

Matrices = Callable[[str], bool]
"""Says by the name of a tensor whether it is a matrix, if it is worth compressing."""

DENSE_BELOW = 1024
"""Tensors with fewer elements are not compressed. A threshold of 64 Ki elements would cost ResNet-50 at top-k 0.1 % its ratio:
74x instead of 414x."""
FUSE_ELEMENTS = 1 << 15
"""Small tensors share a key up to this many elements: a message costs about as much as 30 Ki half floats on a fast link,
and a key is sent only when its last gradient is there."""
FUSE_AT_LEAST = 1 << 10
"""A fused key is not made smaller than this to give every shard one: below 2 KiB a message is all header."""
MATRIX_ELEMENTS = 1 << 23
"""Elements of the largest key that is a matrix: what a worker hands over of one as it leaves, float32, fills the 16 frames of a
message."""
SHARED_BY = 8
"""Keys that a model's compressible tensors make at least, where `SHARED_AT_LEAST` allows: one key has one server and one codec
thread, and what is not cut is neither sent while it is encoded nor shared by links."""
SHARED_AT_LEAST = 1 << 18
"""Elements from which on a partition may be cut for that: below, a key costs more than it shares."""
MAX_FUSED = 32
"""Slices in a fused key: the used bits of a push travel as one unsigned integer."""
MAX_TENSORS = 100_000
MAX_NAME = 512
MAX_DIMENSIONS = 64
"""What torch itself allows. Without it, multiplying the sizes of a hostile shape would take hours."""
MAX_ELEMENTS = 1 << 40
MAX_KEYS = 1 << 18
"""Keys of one layout: 512 GiB of float32 in the largest partitions. A hostile shape costs at most what these objects take."""
MAX_TABLE_BYTES = 16 << 20

KINDS = ("float32", "float64", "float16", "bfloat16")
"""Element types of tensors that have gradients."""


class Tensor(NamedTuple):
    """One row of a tensor table: a trainable parameter, or buffers.

    Attributes:
        name: Differs from all others in the table.
        shape: Its dimensions, in the order in which they lie in memory.
        dtype: Type of its elements.
        buffer: Whether these are buffers: one worker's values for all instead of a mean, always exact, in keys of their own.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    buffer: bool = False

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Rows of the matrix that it is: its first dimensions by the others, so that rows and columns are fewest together."""
        places = range(1, max(2, len(self.shape)))
        return min((math.prod(self.shape[:place]) for place in places), key=lambda rows: rows + self.elements // rows)

    @property
    def small(self) -> bool:
        """Whether it goes dense; fused with its neighbours, unless these are buffers."""
        return self.buffer or len(self.shape) <= 1 or self.elements < DENSE_BELOW


class Slice(NamedTuple):
    """A run of elements of one tensor, and where it stands in the key.

    Attributes:
        tensor: Index in the table.
        start: First element within the flattened tensor.
        length: Elements.
        offset: First element within the key.
    """

    tensor: int
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Key:
    """What is pushed and pulled as one.

    Attributes:
        number: Index in the layout.
        slices: Which elements of which tensors, in order.
        small: Whether it always goes dense: fused small tensors, or buffers.
        shard: Number of the shard that owns it.
        buffer: Whether it holds buffers.
        rows: Rows of the matrix that it is; 0 if it is none.
    """

    number: int
    slices: tuple[Slice, ...]
    small: bool
    shard: int
    buffer: bool = False
    rows: int = 0

    @cached_property
    def elements(self) -> int:
        """Length of the key's vector."""
        return sum(part.length for part in self.slices)

    @property
    def tensor(self) -> int:
        """Index of the tensor whose plan rules this key (its only one, unless it is fused)."""
        return self.slices[0].tensor

    def elements_of(self, used: int) -> list[Slice]:
        """Return the slices whose bit is *not* set in `used` (bit i is slice i)."""
        return [part for position, part in enumerate(self.slices) if not used >> position & 1]

    @property
    def all_used(self) -> int:
        """The used bits when every slice has a gradient."""
        return (1 << len(self.slices)) - 1


class Layout:
    """The keys of one model or tensor, and the shard that owns each.

    Args:
        tensors: The table, in order of registration.
        num_shards: Shards of the whole run.
        partition_elements: Largest key, but for matrices.
        matrices: Says by its name whether a compressible tensor is a matrix, as whole as can be; None for no tensor.

    Raises:
        LayoutError: The table is empty, too large, repeats a name, has an impossible shape or a type without gradients.
    """

    def __init__(
        self, tensors: Sequence[Tensor], *, num_shards: int, partition_elements: int, matrices: Matrices | None = None
    ) -> None:
        if num_shards < 1 or partition_elements < 1:
            raise LayoutError(
                f"expected at least 1 shard and 1 element a partition, got num_shards={num_shards!r} and "
                f"partition_elements={partition_elements!r}"
            )
        self.tensors = tuple(tensors)
        self.num_shards = num_shards
        self.partition_elements = partition_elements
        _check_table(self.tensors)
        self.matrices = frozenset(index for index in self.compressible if matrices and matrices(self.tensors[index].name))
        """Indices of the tensors that are matrices."""
        self.keys = self._assign(self._cut())

    @cached_property
    def elements(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    @cached_property
    def compressible(self) -> tuple[int, ...]:
        """Indices of the tensors that a plan rules."""
        return tuple(index for index, tensor in enumerate(self.tensors) if not tensor.small)

    @cached_property
    def largest(self) -> int:
        """Elements of the largest partition: `partition_elements`, or less where that would leave too few keys to share."""
        together = sum(self.tensors[index].elements for index in self.compressible)
        return min(self.partition_elements, max(SHARED_AT_LEAST, -(-together // SHARED_BY)))

    @cached_property
    def table(self) -> bytes:
        """The table as msgpack: `[[name, [dim, ...], dtype, buffer], ...]`. Its xxh3-64 is the digest."""
        return bytes(msgpack.packb([[tensor.name, list(tensor.shape), tensor.dtype, tensor.buffer] for tensor in self.tensors]))

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that differ when the table or the way it is cut differs."""
        cut = [self.num_shards, self.partition_elements, *sorted(self.matrices)]
        return xxhash.xxh3_64_hexdigest(self.table + "".join(f"/{number}" for number in cut).encode())

    def keys_of_shard(self, shard: int) -> list[Key]:
        """Return the keys that `shard` owns, in order."""
        return [key for key in self.keys if key.shard == shard]

    def difference(self, other: Layout) -> str:
        """Say where two layouts first differ, for the message that refuses a worker. Empty if they agree."""
        for index, (mine, theirs) in enumerate(zip(self.tensors, other.tensors, strict=False)):
            if mine != theirs:
                return f"tensor {index} is {_describe(mine)} there and {_describe(theirs)} here"
        if len(self.tensors) != len(other.tensors):
            return f"there are {len(self.tensors)} tensors there and {len(other.tensors)} here"
        if self.digest != other.digest:
            return f"digest {self.digest} there and {other.digest} here"
        return ""

    def _cut(self) -> list[tuple[bool, list[Slice]]]:
        cut: list[tuple[bool, list[Slice]]] = []
        fused: list[Slice] | None = None
        filled = 0
        full = self._fuse_elements()
        self._check_number(full)
        for index in reversed(range(len(self.tensors))):
            tensor = self.tensors[index]
            if tensor.buffer or not tensor.small:
                size = self._row_block(index) or (self.partition_elements if tensor.buffer else self.largest)
                cut.extend(
                    (tensor.buffer, [Slice(index, start, min(size, tensor.elements - start), 0)])
                    for start in range(0, tensor.elements, size)
                )
                continue
            start = 0
            while start < tensor.elements:
                if fused is None or filled >= full or len(fused) >= MAX_FUSED:
                    fused, filled = [], 0
                    cut.append((True, fused))
                length = min(tensor.elements - start, full - filled)
                fused.append(Slice(index, start, length, filled))
                start += length
                filled += length
        return cut

    def _row_block(self, index: int) -> int:
        """Return the elements of a tensor's keys that are matrices: whole rows, keys of about one size; 0 if they are none."""
        if index not in self.matrices:
            return 0
        tensor = self.tensors[index]
        columns = tensor.elements // tensor.rows
        blocks = -(-tensor.rows // max(1, MATRIX_ELEMENTS // columns))
        return 0 if columns > MATRIX_ELEMENTS else -(-tensor.rows // blocks) * columns

    def _rows(self, parts: Sequence[Slice]) -> int:
        tensor = self.tensors[parts[0].tensor]
        return parts[0].length * tensor.rows // tensor.elements if self._row_block(parts[0].tensor) else 0

    def _fuse_elements(self) -> int:
        """Return the size of a full fused key: an equal share, so that every shard gets as much as any other."""
        small = sum(tensor.elements for tensor in self.tensors if tensor.small and not tensor.buffer)
        rounds = -(-small // (self.num_shards * FUSE_ELEMENTS))
        return max(FUSE_AT_LEAST, -(-small // max(1, rounds * self.num_shards)))

    def _check_number(self, full: int) -> None:
        size = self.largest
        keys = sum(-(-tensor.elements // size) for tensor in self.tensors if tensor.buffer or not tensor.small)
        fused = sum(tensor.elements for tensor in self.tensors if tensor.small and not tensor.buffer)
        keys += -(-fused // full) + len(self.tensors) // MAX_FUSED
        if keys > MAX_KEYS:
            raise LayoutError(
                f"{len(self.tensors)} tensors of {self.elements} elements would make {keys} keys of at most {size} elements; "
                f"expected at most {MAX_KEYS}; raise layout.partition_elements"
            )

    def _assign(self, cut: list[tuple[bool, list[Slice]]]) -> tuple[Key, ...]:
        shard_of: dict[int, int] = {}
        for small in (False, True):
            # Small keys are dealt from the other end, so that one large key of each kind does not meet on shard 0.
            order = range(self.num_shards - 1, -1, -1) if small else range(self.num_shards)
            lightest = [(0, place, shard) for place, shard in enumerate(order)]
            sizes = [(sum(part.length for part in parts), number) for number, (kind, parts) in enumerate(cut) if kind is small]
            for size, number in sorted(sizes, key=lambda pair: (-pair[0], pair[1])):
                load, place, shard = lightest[0]
                heapq.heapreplace(lightest, (load + size, place, shard))
                shard_of[number] = shard
        return tuple(
            Key(number, tuple(parts), small, shard_of[number], self.tensors[parts[0].tensor].buffer, self._rows(parts))
            for number, (small, parts) in enumerate(cut)
        )


def read_table(table: bytes) -> list[Tensor]:
    """Return the tensors of `table` bytes that came over a socket.

    Raises:
        LayoutError: The bytes are not a table within the limits.
    """
    if len(table) > MAX_TABLE_BYTES:
        raise LayoutError(f"a tensor table has at most {MAX_TABLE_BYTES} bytes, this one has {len(table)}")
    try:
        rows = msgpack.unpackb(
            table, max_array_len=MAX_TENSORS, max_str_len=MAX_NAME, max_map_len=0, max_bin_len=0, max_ext_len=0
        )
        return [
            Tensor(_string(name), tuple(map(_count, shape)), _string(dtype), _bool(buffer)) for name, shape, dtype, buffer in rows
        ]
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise LayoutError(f"not a tensor table ({len(table)} bytes): {error}") from None


def _check_table(tensors: Sequence[Tensor]) -> None:
    if not tensors:
        raise LayoutError("expected at least one trainable tensor, got none; is every parameter frozen?")
    if len(tensors) > MAX_TENSORS:
        raise LayoutError(f"expected at most {MAX_TENSORS} tensors, got {len(tensors)}")
    names = set()
    for tensor in tensors:
        try:
            length = len(tensor.name.encode())
        except UnicodeEncodeError:
            raise LayoutError(f"tensor name {tensor.name[:40]!r} is not Unicode text; rename it") from None
        if length > MAX_NAME:
            raise LayoutError(f"tensor name {tensor.name[:40]!r}... is longer than {MAX_NAME} bytes; shorten it")
        if tensor.name in names:
            raise LayoutError(f"tensor name {tensor.name!r} stands twice in the table; names must differ")
        names.add(tensor.name)
        if tensor.buffer and tensor.dtype != "float32":
            raise LayoutError(f"{_describe(tensor)}: buffers travel as float32")
        if tensor.dtype not in KINDS:
            raise LayoutError(f"{_describe(tensor)}: expected one of {', '.join(KINDS)}; train it outside the wrapped model")
        if len(tensor.shape) > MAX_DIMENSIONS:
            raise LayoutError(f"{tensor.name!r} has {len(tensor.shape)} dimensions; expected at most {MAX_DIMENSIONS}")
        if any(size < 1 for size in tensor.shape) or tensor.elements > MAX_ELEMENTS:
            raise LayoutError(f"{_describe(tensor)}: expected 1 to {MAX_ELEMENTS} elements; leave empty tensors out of the model")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.name!r} {tensor.shape} {tensor.dtype}" + " (buffers)" * tensor.buffer


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {value!r}")
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {value!r}")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"expected a size, got {value!r}")
    return value
