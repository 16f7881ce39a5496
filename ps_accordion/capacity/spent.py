"""What processes spend beside kernels, from the processor time of their threads that `bench pushpull` has counted.

`bench codecs` times kernels, with nothing between them. What is left of a codec thread's or a shard's time, in the case of few
bytes, is a cost a key; that of the sockets' threads is a cost a message and a cost a byte, which two cases tell apart: one of few
bytes and one of many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..errors import ConfigError
from ..regimes.base import Choice
from .costs import Carry, Costs, Handling, Work
from .job import Job

__all__ = ["Spent", "costs_from"]


class Spent(NamedTuple):
    """One case of `bench pushpull`.

    Attributes:
        job: What ran.
        cpu: Processor seconds of a round, by kind of thread: of one worker (`worker codec`, `worker sockets`, `worker zeromq`)
            and of all servers (`server shards`, `server sockets`, `server zeromq`).
    """

    job: Job
    cpu: Mapping[str, float]


def costs_from(works: Mapping[Choice, Work], copy: float, spent: Sequence[Spent]) -> Costs:
    """Return the costs that explain two cases. Where kernels alone explain more than was counted, a cost is 0.

    Args:
        works: What codecs cost, those of the cases among them.
        copy: Seconds an element of a copy.
        spent: Two cases of the same job but for the codec.

    Raises:
        ConfigError: Their bytes do not differ by half, or some kind of thread was not counted.
    """
    nothing = Costs(works, copy, Handling(), Handling())
    try:
        cases = sorted((_Case(one, nothing) for one in spent), key=lambda case: case.nbytes)
        if len(cases) < 2 or cases[-1].nbytes < 2 * cases[0].nbytes:
            raise ConfigError(
                "expected two cases that tell messages from bytes, a compressed and a dense one: "
                "ps-accordion bench pushpull --link tcp --cases topk:0.01,dense:32 --json FILE"
            )
        few, many = cases[0], cases[-1]
        worker, server = (
            Handling(few.task(kernels), _carry(few, many, f"{who} sockets"), _carry(few, many, f"{who} zeromq"))
            for who, kernels in (("worker", "worker codec"), ("server", "server shards"))
        )
    except KeyError as error:
        raise ConfigError(
            f"there is no processor time of {error} in the rows of bench pushpull; write them anew, on Linux"
        ) from None
    return Costs(works, copy, worker, server)


class _Case:
    """What a round of one case should come to."""

    def __init__(self, spent: Spent, costs: Costs) -> None:
        job, self.cpu = spent.job, spent.cpu
        loads = job.loads(costs)
        self.keys = len(loads)
        self.nbytes = sum(load.nbytes for load in loads)
        self.kernels = {
            "worker codec": sum(load.encode + load.decode for load in loads),
            "server shards": sum(load.answer for load in loads),
        }
        self.workers = job.workers

    def task(self, kind: str) -> float:
        """Return what a kind of thread spends on a key beside kernels."""
        return max(0.0, self.cpu[kind] - self.kernels[kind]) / self.keys


def _carry(few: _Case, many: _Case, kind: str) -> Carry:
    # Pushes and results; all of them pass the servers.
    times = 2 * (few.workers if kind.startswith("server") else 1)
    byte = max(0.0, (many.cpu[kind] - few.cpu[kind]) / times / (many.nbytes - few.nbytes))
    return Carry(max(0.0, few.cpu[kind] / times - byte * few.nbytes) / few.keys, byte)
