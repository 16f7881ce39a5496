"""The benchmark's worker: time push_pull of one tensor beside gloo all_reduce of the same tensor.

`ps-accordion bench pushpull` starts it once a worker. Both ways run in the same processes, in turn (A B A B ...), each after
a barrier, so that a slow moment of the machine hits both. One torch thread a process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ps_accordion.worker import connect

__all__ = ["main"]

WARM_UP_PAIRS = 2
"""Pairs that are not counted: the first push_pull declares the tensor, and both allocate their buffers."""
TOLERANCE = 1e-5
"""Largest difference between an uncompressed push_pull and gloo's mean: both add the same float32 numbers, in another order."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the pairs, and write every time to the file named by `--result`."""
    parser = argparse.ArgumentParser(prog="ps_accordion.worker.bench")
    parser.add_argument("--elements", type=int, required=True, help="length of the float32 tensor")
    parser.add_argument("--pairs", type=int, required=True, help="how often each way is timed")
    parser.add_argument("--rendezvous", type=Path, required=True, help="a file that does not exist yet, for gloo")
    parser.add_argument("--result", type=Path, required=True, help="JSON file; {rank} is replaced by the worker's rank")
    parser.add_argument("--exact", action="store_true", help="nothing is compressed: compare the result with gloo's")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with connect() as session:
        rank, world_size = session.rank, session.world_size
        dist.init_process_group("gloo", init_method=f"file://{options.rendezvous}", rank=rank, world_size=world_size)
        # Two dimensions: tensors with one, such as biases, are never compressed.
        source = torch.randn(1, options.elements, generator=torch.Generator().manual_seed(rank))
        ours, theirs = source.clone(), source.clone()
        times: dict[str, list[float]] = {"ms": [], "baseline_ms": []}
        for pair in range(-WARM_UP_PAIRS, options.pairs):
            ours.copy_(source)
            theirs.copy_(source)
            ms = _timed(lambda: session.push_pull(ours, name="bench"))
            baseline_ms = _timed(lambda: dist.all_reduce(theirs))
            if pair >= 0:
                times["ms"].append(ms)
                times["baseline_ms"].append(baseline_ms)
        difference = float((ours - theirs / world_size).abs().max())
        if options.exact and difference > TOLERANCE:
            raise RuntimeError(f"push_pull differs from gloo's mean by {difference:g}, expected at most {TOLERANCE:g}")
        dist.barrier()
        dist.destroy_process_group()
    file = str(options.result).replace("{rank}", str(rank))
    Path(file).write_text(json.dumps(times | {"difference": difference}), encoding="utf-8")


def _timed(operation: Callable[[], object]) -> float:
    """Return the milliseconds that `operation` takes once all workers have come to it."""
    dist.barrier()
    start = time.perf_counter()
    operation()
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
