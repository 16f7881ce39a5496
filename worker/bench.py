"""The benchmarks' worker: times what we do beside what people use today, in the same processes.

`ps-accordion bench` starts it once a worker. All ways take turns (A B C A B C ...), each after a barrier, so that a slow moment
of the machine hits all. One torch thread a process.

    pushpull   push_pull of one tensor beside gloo all_reduce of the same tensor
    step       a whole training step through our wrapper, beside DistributedDataParallel, and beside a model that shares nothing
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ps_accordion.selection import momenta
from ps_accordion.worker import DistributedModel, connect
from ps_accordion.worker.base import BaseSession
from ps_accordion.worker.baselines import BASELINES
from ps_accordion.worker.processor import Seconds, server_seconds, worker_seconds

__all__ = ["Contest", "main"]

WARM_UP_TURNS = 2
"""Turns that are not counted: the first declares the tensors, and all ways allocate their buffers."""
TOLERANCE = 1e-5
"""Largest difference between ours, uncompressed, and the first baseline: both add the same float32 numbers, in another order."""
RATE, MOMENTUM = 1e-3, 0.9


class Contest(NamedTuple):
    """What is compared.

    Attributes:
        ways: What is timed, by name; ours first.
        before: Called before each turn, and not timed.
        difference: How far ours is from the first of the others at the end.
    """

    ways: Mapping[str, Callable[[], object]]
    before: Callable[[], object]
    difference: Callable[[], float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the turns, and write every time to the file named by `--result`."""
    parser = argparse.ArgumentParser(prog="ps_accordion.worker.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, required=True, help="how often each way is timed")
    parser.add_argument("--rendezvous", type=Path, required=True, help="a file that does not exist yet, for gloo")
    parser.add_argument("--result", type=Path, required=True, help="JSON file; {rank} is replaced by the worker's rank")
    parser.add_argument("--exact", action="store_true", help="nothing is compressed: compare the result with the baseline's")
    what = parser.add_subparsers(dest="what", required=True)
    tensor = what.add_parser("pushpull", help="push_pull beside gloo all_reduce")
    tensor.add_argument("--elements", type=int, required=True, help="length of the float32 tensor")
    step = what.add_parser("step", help="a training step beside DistributedDataParallel")
    step.add_argument("--layers", type=int, required=True, help="linear layers of the network")
    step.add_argument("--width", type=int, required=True, help="inputs and outputs of a layer")
    step.add_argument("--batch", type=int, required=True, help="rows of a batch")
    step.add_argument("--device", default="cpu", help="where the models lie: cpu, or an accelerator such as cuda")
    step.add_argument("--baselines", nargs="+", choices=list(BASELINES), required=True, help="what to compare with")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with connect() as session:
        rank, world_size = session.rank, session.world_size
        dist.init_process_group("gloo", init_method=f"file://{options.rendezvous}", rank=rank, world_size=world_size)
        contest = _pushpull(session, options) if options.what == "pushpull" else _step(session, options)
        times: dict[str, list[float]] = {way: [] for way in contest.ways}
        spent: list[Seconds] = []
        for turn in range(-WARM_UP_TURNS, options.turns):
            contest.before()
            for way, operation in contest.ways.items():
                ms, seconds = _timed(operation, counts=rank == 0, counted=way == "ours")
                if turn >= 0:
                    times[way].append(ms)
                    spent += [seconds] if seconds else []
        difference = contest.difference()
        if options.exact and difference > TOLERANCE:
            raise RuntimeError(f"ours differs from the baseline by {difference:g}, expected at most {TOLERANCE:g}")
        dist.barrier()
        dist.destroy_process_group()
    file = str(options.result).replace("{rank}", str(rank))
    Path(file).write_text(json.dumps({"times": times, "difference": difference, "cpu_ms": _medians(spent)}), encoding="utf-8")


def _pushpull(session: BaseSession, options: argparse.Namespace) -> Contest:
    # Two dimensions: tensors with one, such as biases, are never compressed.
    source = torch.randn(1, options.elements, generator=torch.Generator().manual_seed(session.rank))
    ours, theirs = source.clone(), source.clone()

    def before() -> None:
        ours.copy_(source)
        theirs.copy_(source)

    return Contest(
        {"ours": lambda: session.push_pull(ours, name="bench"), "all_reduce": lambda: dist.all_reduce(theirs)},
        before,
        lambda: float((ours - theirs / session.world_size).abs().max()),
    )


def _step(session: BaseSession, options: argparse.Namespace) -> Contest:
    torch.manual_seed(0)
    device = torch.device(options.device)
    module = nn.Sequential(*[nn.Linear(options.width, options.width) for _ in range(options.layers)]).to(device)
    batch = torch.randn(options.batch, options.width, generator=torch.Generator().manual_seed(session.rank)).to(device)
    modules = {name: copy.deepcopy(module) for name in ("ours", *options.baselines, "alone")}
    wrap: dict[str, Callable[[nn.Module], nn.Module]] = {
        "ours": lambda module: DistributedModel(module, session=session),
        "alone": lambda module: module,
    }
    given = momenta(session.settings.codec, dict(module.named_parameters()))  # then the optimizer has none
    ways = {
        name: _trainer((wrap | BASELINES)[name](modules[name]), batch, momentum=0.0 if given and name == "ours" else MOMENTUM)
        for name in modules
    }

    def difference() -> float:
        pairs = zip(modules["ours"].parameters(), modules[options.baselines[0]].parameters(), strict=True)
        return max(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs)

    return Contest(ways, lambda: None, difference)


def _trainer(model: nn.Module, batch: torch.Tensor, *, momentum: float) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=momentum)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        if batch.device.type != "cpu":
            torch.accelerator.synchronize(batch.device)  # the host is ahead of the device, which is what is timed

    return step


def _timed(operation: Callable[[], object], *, counts: bool, counted: bool) -> tuple[float, Seconds]:
    """Return the milliseconds that `operation` takes once all workers have come to it, and processor seconds by kind of thread.

    These are those from before it until all workers have done it, if `counted`; those of the servers, too, at who `counts` them.
    """
    dist.barrier()
    before = _spent(counts) if counted else {}
    dist.barrier()
    start = time.perf_counter()
    operation()
    ms = 1000 * (time.perf_counter() - start)
    dist.barrier()
    return ms, {kind: seconds - before.get(kind, 0.0) for kind, seconds in _spent(counts).items()} if counted else {}


def _spent(counts: bool) -> Seconds:
    return worker_seconds() | server_seconds() if counts else worker_seconds()


def _medians(spent: Sequence[Seconds]) -> dict[str, float]:
    return {kind: 1e3 * statistics.median(one.get(kind, 0.0) for one in spent) for kind in (spent[0] if spent else ())}


if __name__ == "__main__":
    main()
