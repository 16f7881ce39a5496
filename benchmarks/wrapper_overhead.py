"""What the wrapper alone costs: backward of a wrapped model beside backward of the model itself.

    python -m benchmarks.wrapper_overhead [--pairs 31] [--threads 1] [--json FILE]

Six linear layers of 2048 x 2048 (25 M parameters), batch 8, one process, nothing to send: the session has no servers, so that
hook, futures and callbacks are all there is. Four backwards are timed in turn:

    plain         the model itself
    ddp           DistributedDataParallel over a group of one
    empty hook    the same with a communication hook that does nothing: what the parent class costs
    ps-accordion  DistributedModel

The wrapper alone is what ps-accordion takes beyond the empty hook, as a share of the plain backward.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ps_accordion import config
from ps_accordion.worker import DistributedModel
from ps_accordion.worker.alone import Alone
from ps_accordion.worker.group import group_of_one

WIDTH, LAYERS, BATCH = 2048, 6, 8


def network():
    """Return the network of all our figures."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def with_empty_hook(module):
    """Return the model under DistributedDataParallel with a hook that hands every bucket back as it is."""

    def hook(_, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model = DistributedDataParallel(module, process_group=group_of_one(), gradient_as_bucket_view=True)
    model.register_comm_hook(None, hook)
    return model


def backward_ms(model, x):
    """Return how long one backward takes, in ms; gradients are None before it, as after `zero_grad()`."""
    model.zero_grad()
    loss = model(x).square().mean()
    begin = time.perf_counter()
    loss.backward()
    return 1000 * (time.perf_counter() - begin)


def main():
    """Time them in turn and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=31, help="measurements of each (default 31)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = torch.randn(BATCH, WIDTH)
    with Alone(config.load(environment={})) as session:
        models = {
            "plain": network(),
            "ddp": DistributedDataParallel(network(), process_group=group_of_one(), gradient_as_bucket_view=True),
            "empty hook": with_empty_hook(network()),
            "ps-accordion": DistributedModel(network(), session=session),
        }
        times = {name: [] for name in models}
        for pair in range(options.pairs + 3):
            for name, model in models.items():
                taken = backward_ms(model, x)
                if pair >= 3:  # buckets are rebuilt after the first step
                    times[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    print(f"backward of {LAYERS} x {WIDTH}x{WIDTH}, batch {BATCH}, threads {options.threads}, median of {options.pairs} in turn")
    for name, median in medians.items():
        print(f"  {name:13} {median:7.1f} ms  {median / medians['plain']:5.2f}x plain")
    alone = [
        100 * (ours - empty) / plain
        for ours, empty, plain in zip(*(times[name] for name in ("ps-accordion", "empty hook", "plain")), strict=True)
    ]
    print(f"  the wrapper alone: {statistics.median(alone):.1f} % of the plain backward, median of the differences in each turn")
    if options.json:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "processor": platform.processor()}
        options.json.write_text(json.dumps({"medians_ms": medians, "times_ms": times, "machine": machine}, indent=1) + "\n")


if __name__ == "__main__":
    main()
