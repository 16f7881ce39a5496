"""The demo's training script: a small convolutional network on scikit-learn's handwritten digits.

`ps-accordion demo` starts it once a worker, and once more with `--dense` for comparison: one process, the joined batch,
the same seeds, data order and epochs, no compression. It is written as a user would write a script, from public names only.

The network has no batch-norm: its statistics would differ between half a batch and the whole one, and the comparison
should show compression alone.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from ps_accordion.worker import DistributedModel, connect

__all__ = ["Digits", "SmallConvNet", "main"]

TEST_IMAGES = 360
"""A fifth of the 1,797 images."""
SPLIT_SEED = 20_210_405
"""The split never changes with the run's seed: all runs are tested on the same images."""
BATCH = 64
"""Images a step, all workers together."""
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 1e-4
RATE_DROPS = (0.6, 0.85)
"""Parts of the run after which the learning rate falls to a tenth."""


class SmallConvNet(nn.Module):
    """Two convolutions and two linear layers: 151,306 parameters, most of them in `hidden`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(1024, 128)
        self.out = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, float32[n, 10], for images, float32[n, 1, 8, 8] in 0..1."""
        features = functional.relu(self.first(images))
        features = functional.max_pool2d(functional.relu(self.second(features)), 2)
        logits: Tensor = self.out(functional.relu(self.hidden(features.flatten(1))))
        return logits


class Digits:
    """The data: a fixed split, and for every epoch one order that all workers share."""

    def __init__(self, seed: int) -> None:
        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(data.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
        self.test = images[order[:TEST_IMAGES]], labels[order[:TEST_IMAGES]]
        self._images, self._labels = images[order[TEST_IMAGES:]], labels[order[TEST_IMAGES:]]
        self._seed = seed

    @property
    def steps(self) -> int:
        """Steps an epoch; the last images, too few for a batch, are left out."""
        return len(self._labels) // BATCH

    def batch(self, epoch: int, step: int, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
        """Return this worker's share of a batch: images and labels."""
        order = torch.randperm(len(self._labels), generator=torch.Generator().manual_seed(1_000_003 * self._seed + epoch))
        share = BATCH // world_size
        start = step * BATCH + rank * share
        mine = order[start : start + share]
        return self._images[mine], self._labels[mine]

    def accuracy(self, model: nn.Module) -> float:
        """Return the part of the test images that `model` names rightly, 0 to 1."""
        images, labels = self.test
        with torch.no_grad():
            return float((model(images).argmax(1) == labels).float().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and write what came out to the file named by `--result`."""
    parser = argparse.ArgumentParser(prog="ps_accordion.worker.demo")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True, help="JSON file; {rank} is replaced by the worker's rank")
    parser.add_argument("--dense", action="store_true", help="train alone, on the joined batch, without compression")
    parser.add_argument("--momentum", type=float, default=MOMENTUM, help="of the optimizer: 0 with dgc, which brings its own")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with contextlib.nullcontext() if options.dense else connect() as session:
        result = _train(session, epochs=options.epochs, seed=options.seed, momentum=options.momentum)
    file = str(options.result).replace("{rank}", str(0 if session is None else session.rank))
    Path(file).write_text(json.dumps(result), encoding="utf-8")


def _train(session: Any, *, epochs: int, seed: int, momentum: float) -> dict[str, Any]:
    rank, world_size = (0, 1) if session is None else (session.rank, session.world_size)
    digits = Digits(seed)
    torch.manual_seed(seed)
    network = SmallConvNet()
    model = network if session is None else DistributedModel(network, session=session)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=momentum, weight_decay=WEIGHT_DECAY)
    drops = sorted({max(1, round(part * epochs)) for part in RATE_DROPS})
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=drops)
    if session is not None:
        session.track(optimizer, scheduler=scheduler)
    start = time.monotonic()
    for epoch in range(epochs):
        if session is not None:
            session.begin_epoch(epoch)
        for step in range(digits.steps):
            images, labels = digits.batch(epoch, step, rank, world_size)
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without hints
            optimizer.step()
            if session is not None:
                session.log(loss=float(loss.detach()))
        scheduler.step()
        accuracy = digits.accuracy(network)
        if session is not None:
            session.log(accuracy=accuracy)
    return {
        "accuracy": accuracy,
        "seconds": time.monotonic() - start,
        "steps_per_epoch": digits.steps,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "compressed": [name for name, tensor in network.named_parameters() if tensor.dim() > 1 and tensor.numel() >= 1024],
        "digest": _digest(network),
        "push_bytes": 0 if session is None else session.counters.push_bytes,
        "pull_bytes": 0 if session is None else session.counters.pull_bytes,
        "startup_bytes": 0 if session is None else session.counters.startup_bytes,
    }


def _digest(network: nn.Module) -> str:
    """Return a digest of all parameters: equal on all workers, to the last bit."""
    digest = hashlib.blake2b(digest_size=16)
    for parameter in network.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
