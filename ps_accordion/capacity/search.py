"""How many servers and shards a job wants: the fewest that are about as fast as the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..config import MAX_SHARDS
from .costs import Costs
from .job import Job
from .step import Step, simulate

__all__ = ["NEARLY", "Candidate", "candidates", "recommended"]

NEARLY = 1.05
"""What is within 5 % of the shortest step is as good as that: the prediction itself is not nearer to the truth."""
MOST_SHARDS = 8
"""Shards a server that are tried at most; a server's one thread of sockets keeps no more of them busy."""
SIMULATED_WORKERS = 16
"""Workers that are simulated to compare candidates; each stands for several where there are more."""


class Candidate(NamedTuple):
    """A number of servers and shards, and what a step then takes."""

    job: Job
    step: Step


def candidates(job: Job, costs: Costs, *, told: Callable[[Candidate], object] = lambda _: None) -> list[Candidate]:
    """Return what a step takes with 1, 2, 4, ... servers up to one a worker, and 1, 2, 4, ... shards in each.

    A server has at most as many shards as cores. More shards are tried only where shards are what limits a step.

    Args:
        job: The job; its own numbers of servers and shards do not matter.
        costs: What its work costs.
        told: Called with each candidate as soon as it is known.
    """
    found: list[Candidate] = []
    for servers in [*_doubling(job.workers - 1), job.workers]:
        for shards in _doubling(min(MOST_SHARDS, job.shared_cores or job.server_cores)):
            if servers * shards > MAX_SHARDS:
                break
            tried = replace(job, servers=servers, shards_per_server=shards)
            found.append(Candidate(tried, simulate(tried, costs, most_workers=SIMULATED_WORKERS)))
            told(found[-1])
            if found[-1].step.limit != "server shards" and found[-1].step.busy["server shards"] < 0.5:
                break
    return found


def recommended(found: Sequence[Candidate]) -> Candidate:
    """Return the candidate with the fewest servers, and then shards, whose step is within `NEARLY` of the shortest."""
    shortest = min(candidate.step.seconds for candidate in found)
    good = (candidate for candidate in found if candidate.step.seconds <= NEARLY * shortest)
    return min(good, key=lambda candidate: (candidate.job.servers, candidate.job.shards_per_server))


def _doubling(most: int) -> list[int]:
    return [1 << power for power in range(max(0, most).bit_length())]
