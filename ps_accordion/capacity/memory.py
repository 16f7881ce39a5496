"""The memory that a job takes beyond processes that are idle, by formula.

    server   2 residuals (the last one, and the one before: its undo)         8 bytes an element of keys that keep one
             held payloads: pushes of the open round, or yet to be read       members x payload, of all keys at worst
             open accumulators                                                4 bytes an element of the largest key, a shard
             last results, as they were sent: two copies of a record          2 x payload
    worker   residual                                                         4 bytes an element of keys that keep one
             codec state: momentum of codecs that have it                     4 bytes an element
             one spare vector a codec thread                                  4 bytes an element of the largest key
             the payload of the open round, results of this and the last      3 x payload
             retained payloads                                                replay rounds x payload

Gradients, parameters and the optimizer's state are the script's own. `benchmarks/cost.py` compares this with real processes.
"""

from __future__ import annotations

from typing import NamedTuple

from ..codecs import registry
from ..selection import codecs_of
from .job import Job

__all__ = ["Memory", "memory_of"]


class Memory(NamedTuple):
    """Bytes by what they are for; `server` is the fullest one.

    Attributes:
        server: residuals, held payloads, accumulators, last results.
        worker: residual, codec state, spare vectors, payloads and results, retained payloads.
    """

    server: dict[str, int]
    worker: dict[str, int]


def memory_of(job: Job) -> Memory:
    """Return what the formula gives."""
    servers = [dict.fromkeys(("residuals", "held payloads", "accumulators", "last results"), 0) for _ in range(job.servers)]
    worker = dict.fromkeys(("residual", "codec state", "spare vectors", "payloads and results", "retained payloads"), 0)
    largest: dict[int, int] = {}
    for key, choice, payload in job.payloads():
        codec = registry.fitted(codecs_of(job.settings), key.rows)[choice.codec]
        server, n = servers[key.shard // job.shards_per_server], key.elements
        keeps = codec.keeps(choice.level)
        largest[key.shard] = max(n, largest.get(key.shard, 0))
        server["residuals"] += 8 * n * keeps
        server["held payloads"] += job.workers * payload
        server["last results"] += 2 * payload
        worker["residual"] += 4 * n * keeps
        worker["codec state"] += 4 * n * bool(codec.momentum)
        worker["payloads and results"] += 3 * payload
        worker["retained payloads"] += job.replay_rounds * payload
    for shard, elements in largest.items():
        servers[shard // job.shards_per_server]["accumulators"] += 4 * elements
    worker["spare vectors"] = job.threads * 4 * max(largest.values())
    return Memory(max(servers, key=lambda one: sum(one.values())), worker)
