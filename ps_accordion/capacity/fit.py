"""What messages and bytes cost, from whole rounds or steps that were measured.

`bench codecs` times kernels, with nothing between them. The rest of a round (Python, sockets, the kernel's network, caches that
have gone cold) is a cost a message and a cost a byte, and the two follow from two measurements: of a job with few bytes, which
is nearly all messages, and of one with many. So the simulation is asked which costs give the times that were seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..errors import ConfigError
from .costs import Costs
from .job import Job
from .step import simulate

__all__ = ["Observed", "fitted"]

_ROUNDS = 6
"""Turns in which one of the two is found with the other as it stands; they have settled to a thousandth by then."""
_HALVINGS = 24
_MOST_MESSAGE, _MOST_BYTE = 0.1, 1e-6
"""Costs that are looked for at most: a tenth of a second a message, and a megabyte a second."""


class Observed(NamedTuple):
    """A job, and the seconds that a step of it took."""

    job: Job
    seconds: float


def fitted(costs: Costs, observed: Sequence[Observed]) -> Costs:
    """Return costs with those of messages and bytes that explain two measured jobs, one of few bytes and one of many.

    Where kernels alone explain more than was measured, a cost is 0.

    Args:
        costs: What codecs cost.
        observed: Two or more; the one with the fewest bytes and the one with the most are used.

    Raises:
        ConfigError: There are not two whose bytes differ by half.
    """
    by_bytes = sorted(observed, key=lambda one: sum(load.nbytes for load in one.job.loads(costs)))
    weights = [sum(load.nbytes for load in one.job.loads(costs)) for one in by_bytes]
    if len(by_bytes) < 2 or weights[-1] < 2 * weights[0]:
        raise ConfigError(
            "expected two measurements that tell messages from bytes, one of a compressed job and one of a dense one: "
            "ps-accordion bench pushpull --cases topk:0.01,dense:32 --json FILE"
        )
    few, many = by_bytes[0], by_bytes[-1]
    for _ in range(_ROUNDS):
        costs = replace(costs, message=_explaining(few, _with_message(costs), _MOST_MESSAGE))
        costs = replace(costs, byte=_explaining(many, _with_byte(costs), _MOST_BYTE))
    return costs


def _with_message(costs: Costs) -> Callable[[float], Costs]:
    return lambda value: replace(costs, message=value)


def _with_byte(costs: Costs) -> Callable[[float], Costs]:
    return lambda value: replace(costs, byte=value)


def _explaining(observed: Observed, with_: Callable[[float], Costs], most: float) -> float:
    """Return the cost from 0 to `most` with which a job takes as long as it did; a step never gets shorter with it."""
    low, high = 0.0, most
    if simulate(observed.job, with_(low)).seconds >= observed.seconds:
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if simulate(observed.job, with_(middle)).seconds < observed.seconds:
            low = middle
        else:
            high = middle
    return (low + high) / 2
