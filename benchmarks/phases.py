"""What a worker of the benchmarks computes in a step, by itself: forward, backward and optimizer, each timed.

    python -m benchmarks.phases [--layers 6] [--processes 2] [--steps 20]

As many processes as workers share the machine's cores compute at the same time, as in training, and none shares anything.
Prints the medians, in ms, as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from benchmarks.training import BATCH, WIDTH

__all__ = ["measured"]

WARM_UP = 3


def measured(layers: int, processes: int, steps: int) -> dict[str, float]:
    """Return the median milliseconds of each phase, of all steps of all processes."""
    command = [sys.executable, "-m", "benchmarks.phases", "--layers", str(layers), "--steps", str(steps), "--one"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"a worker that only computes has failed: exit codes {[process.returncode for process in running]}")
    every = [json.loads(output) for output in outputs]
    return {phase: statistics.median(time for one in every for time in one[phase]) for phase in every[0]}


def _one(layers: int, steps: int) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(layers)])
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    batch = torch.randn(BATCH, WIDTH)
    times: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
    for step in range(WARM_UP + steps):
        marks = [time.perf_counter()]
        optimizer.zero_grad()
        loss = module(batch).square().mean()
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        optimizer.step()
        marks.append(time.perf_counter())
        if step >= WARM_UP:
            for phase, begin, end in zip(times, marks, marks[1:], strict=False):
                times[phase].append(1000 * (end - begin))
    return times


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    one = options.one
    print(json.dumps(_one(options.layers, options.steps) if one else measured(options.layers, options.processes, options.steps)))


if __name__ == "__main__":
    main()
