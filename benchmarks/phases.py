"""How a step of the benchmarks' network divides into forward, backward and optimizer, on a worker by itself.

    python -m benchmarks.phases [--layers 6] [--steps 20]

Prints the median shares of a step, as JSON.
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

__all__ = ["shares"]

WARM_UP = 3


def shares(layers: int, steps: int) -> list[float]:
    """Return the shares of forward, backward and optimizer in a step, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.phases", "--layers", str(layers), "--steps", str(steps)]
    return [float(share) for share in json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)]


def _shares(layers: int, steps: int) -> list[float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(layers)])
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    batch = torch.randn(BATCH, WIDTH)
    times: list[tuple[float, float, float]] = []
    for _ in range(WARM_UP + steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        loss = module(batch).square().mean()
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        optimizer.step()
        times.append((forward - began, backward - forward, time.perf_counter() - backward))
    medians = [statistics.median(phase) for phase in zip(*times[WARM_UP:], strict=True)]
    return [round(median / sum(medians), 4) for median in medians]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    print(json.dumps(_shares(options.layers, options.steps)))


if __name__ == "__main__":
    main()
