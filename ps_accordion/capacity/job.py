"""What a job is to a simulation: its machines, and what each of its keys weighs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..codecs import registry
from ..compression import CodecSettings
from ..config import LayoutSettings, Settings
from ..errors import ConfigError
from ..layout import Key, Layout, Tensor
from ..regimes.base import Choice
from ..selection import Selection, codecs_of, lay_out
from ..wire import framing, messages
from .costs import Costs

__all__ = ["TCP_SHARE", "Compute", "Job", "Link", "Load"]

TCP_SHARE = 1448 / 1538
"""Of a link's bits, those that are TCP payload: 1,448 of the 1,538 bytes that a full Ethernet frame takes with its headers, time
stamps, preamble and gap. One connection between two limited namespaces carries 94.4 % (`benchmarks/README.md`)."""
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20
"""Bytes of gradients from which on DistributedDataParallel hands a bucket over: its defaults, first and later ones."""


class Link(NamedTuple):
    """A host's link, alike in both directions.

    Attributes:
        bits: A second; infinite for memory.
        delay: Seconds that a packet takes to the middle of the network: a quarter of a round trip between two hosts alike.
    """

    bits: float
    delay: float = 0.0

    @property
    def bytes_per_second(self) -> float:
        """What it carries of messages."""
        return self.bits / 8 * TCP_SHARE


class Compute(NamedTuple):
    """What a worker computes in a step, in seconds of one core (or of a device: then give the time).

    Attributes:
        forward: Before the first gradient.
        backward: From there to the last one.
        optimizer: After the last result.
    """

    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


NO_COMPUTE = Compute()


class Load(NamedTuple):
    """What one key of a layout is to the processes that handle it.

    Attributes:
        key: Its number.
        shard: The shard that owns it.
        nbytes: A push or a result, header included.
        encode: Seconds of a worker's codec thread.
        decode: Seconds of a worker's codec thread.
        answer: Seconds of its shard's thread, for all members.
        bucket: Index of the bucket of gradients with which it is complete.
    """

    key: int
    shard: int
    nbytes: float
    encode: float
    decode: float
    answer: float
    bucket: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job on machines.

    Attributes:
        tensors: Table of the model, in order of registration.
        choice: Codec and level of the tensors that are worth compressing.
        workers: How many, each on a host of its own.
        servers: How many, each on a host of its own, unless `colocated`.
        shards_per_server: Compute threads of a server.
        worker_link: Of each worker's host.
        server_link: Of each server's host.
        colocated: Whether server n is on the host of worker n, modulo their number.
        worker_cores: Of each worker's host.
        server_cores: Of each server's host.
        shared_cores: Cores that all these hosts share, as namespaces of one machine do; 0 if each has its own.
        threads: Codec threads of a worker.
        compute: What a worker computes.
        bucketed: Whether gradients come in buckets, as from DistributedDataParallel; else all at once.
        partition_elements: Largest key; 0 chooses it as a job over a network does.
        replay_rounds: Rounds whose pushes workers keep.
    """

    tensors: tuple[Tensor, ...]
    choice: Choice
    workers: int
    servers: int
    shards_per_server: int
    worker_link: Link
    server_link: Link
    worker_cores: int
    server_cores: int
    threads: int
    compute: Compute = NO_COMPUTE
    colocated: bool = False
    shared_cores: int = 0
    bucketed: bool = True
    partition_elements: int = 0
    replay_rounds: int = 0

    def __post_init__(self) -> None:
        for name in ("workers", "servers", "shards_per_server", "worker_cores", "server_cores", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', ' ')}: expected at least 1, got {getattr(self, name)}")

    @property
    def settings(self) -> CodecSettings:
        """The settings of codecs."""
        codec, level = self.choice
        return CodecSettings(name=codec, light=level, heavy=level)

    @property
    def elements(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def choices(self) -> list[Choice]:
        """Codecs and levels of which costs have to be known."""
        return sorted({choice for _, choice, _ in self.payloads()})

    def layout(self) -> Layout:
        """Return the layout that all processes of the job have."""
        settings = Settings(codec=self.settings, layout=LayoutSettings(partition_elements=self.partition_elements))
        return lay_out(self.tensors, settings, num_shards=self.servers * self.shards_per_server)

    def payloads(self) -> Iterator[tuple[Key, Choice, int]]:
        """Yield each key, with its codec and level, and the bytes of its payload."""
        layout, settings = self.layout(), self.settings
        selection, codecs = Selection(settings, layout), codecs_of(settings)
        for key in layout.keys:
            choice = selection.fixed(key) or self.choice
            yield key, choice, registry.fitted(codecs, key.rows)[choice.codec].payload_bound(key.elements, choice.level)

    def buckets(self) -> list[tuple[int, float]]:
        """Return the buckets in the order in which backward fills them: their first tensor, and their share of all elements."""
        buckets: list[tuple[int, float]] = []
        if not self.bucketed:
            return [(0, 1.0)]
        filled = 0
        for index in reversed(range(len(self.tensors))):
            filled += self.tensors[index].elements
            if index == 0 or 4 * filled >= (BUCKET if buckets else FIRST_BUCKET):
                buckets.append((index, filled / self.elements))
                filled = 0
        return buckets

    def loads(self, costs: Costs) -> list[Load]:
        """Return what each key is, in the order in which workers push.

        Raises:
            ConfigError: A codec's costs are not known.
        """
        firsts = [first for first, _ in self.buckets()]
        loads = []
        for key, choice, nbytes in self.payloads():
            work, n = costs.work(choice), key.elements
            first = min(part.tensor for part in key.slices)
            bucket = next(number for number, start in enumerate(firsts) if first >= start)
            task = costs.worker.task / 2  # for the push, and for the result
            answer = costs.server.task + n * work.answered(self.workers)
            encode, decode = task + n * work.encode, task + n * work.decode
            loads.append(Load(key.number, key.shard, nbytes + _header(), encode, decode, answer, bucket))
        return loads


@functools.cache
def _header() -> int:
    """Return the bytes of a push's header in the middle of a run."""
    push = messages.Push(
        0, 100, 10_000, 1, 1 << 40, "DATA", 1.0, 1, False, "codec", 0.01, 1 << 19, 5243, 0, framing.frame_lengths(20_972)
    )  # fmt: skip
    return sum(memoryview(frame).nbytes for frame in framing.pack(push))
