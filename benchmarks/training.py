"""A worker of the benchmarks: trains a network of large linear layers whenever it has its turn, and says what its steps took.

Run by the benchmarks, with one of `WAYS` to share gradients. Layers of 2048 x 2048, batch 8, SGD with momentum, one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import distributed, nn

from benchmarks import turns
from ps_accordion.worker import DistributedModel, connect
from ps_accordion.worker.baselines import BASELINES

__all__ = ["WAYS", "end_of"]

WIDTH, BATCH = 2048, 8


@contextlib.contextmanager
def _ours(module: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    with connect() as session:
        yield DistributedModel(module, session=session), session.rank


@contextlib.contextmanager
def _alone(module: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    yield module, int(os.environ["RANK"])


@contextlib.contextmanager
def _baseline(wrap: Callable[[nn.Module], nn.Module], module: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    # RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them.
    distributed.init_process_group("gloo")
    try:
        yield wrap(module), distributed.get_rank()
    finally:
        distributed.destroy_process_group()


WAYS: dict[str, Callable[[nn.Module], contextlib.AbstractContextManager[tuple[nn.Module, int]]]] = {
    "ours": _ours,
    "alone": _alone,
    **{name: functools.partial(_baseline, wrap) for name, wrap in BASELINES.items()},
}


def main() -> None:
    """Train in turns until the last one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--turns", type=Path, required=True, help="directory with the pipes that give turns")
    parser.add_argument("--job", required=True, help="name of the job there")
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(options.layers)])
    with WAYS[options.way](module) as (model, rank):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        batch = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(rank))
        for steps, answer in turns.given(options.turns, options.job, rank):
            took = []
            for _ in range(steps):
                began = time.perf_counter()
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()
                took.append(1000 * (time.perf_counter() - began))
            answer(took if steps else _hash(module))
    end_of(options.way)


def end_of(way: str) -> None:
    """End a process that is done, at once where gloo was used.

    At the end of the interpreter a thread of its may have a tensor to drop, ask for Python's lock, and abort the process.
    """
    if way in BASELINES:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
