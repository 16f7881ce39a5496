"""Small networks, and trainings of them that return what they came to: the same on the host and on a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ps_accordion.worker import DistributedModel, Session

__all__ = ["STEPS", "Dropping", "Network", "draw", "loss_of", "same", "state", "train", "train_sums"]

STEPS = 8


def draw(*shape: int, seed: int) -> torch.Tensor:
    """Return random numbers that depend on nothing else."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Network(nn.Module):
    """A network with a branch that a step may leave out, and batch-norm if asked for."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Linear(20, 64)
        self.norm = nn.BatchNorm1d(64) if norm else nn.Identity()
        self.left, self.right = nn.Linear(64, 32), nn.Linear(64, 32)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(draw(*parameter.shape, seed=index) * 0.2)

    def forward(self, x: torch.Tensor, branch: str = "both") -> torch.Tensor:
        """Run the branches asked for."""
        hidden = torch.relu(self.norm(self.trunk(x)))
        parts = [getattr(self, name)(hidden) for name in ("left", "right") if branch in (name, "both")]
        return sum(parts[1:], parts[0])


class Dropping(nn.Module):
    """A network whose backward draws random numbers: layers with dropout that it computes again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(20, 256), nn.Linear(256, 32)
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(12))

    def forward(self, x: torch.Tensor, branch: str = "both") -> torch.Tensor:
        """Run all layers."""
        hidden = self.first(x)
        for layer in self.layers:
            hidden = checkpoint(lambda h, layer=layer: functional.dropout(torch.relu(layer(h)), 0.1), hidden, use_reentrant=False)
        return self.last(hidden)


def loss_of(model: nn.Module, step: int, rank: int, **how: Any) -> torch.Tensor:
    """Return the loss on one worker's batch of one step, in the type of the model."""
    like = next(model.parameters())
    x, y = (draw(8, size, seed=1000 * step + 10 * rank + size).to(like.device, like.dtype) for size in (20, 32))
    return functional.mse_loss(model(x, **how), y)


def state(model: nn.Module) -> list[torch.Tensor]:
    """Return a copy of all parameters and buffers, on the host."""
    return [tensor.detach().cpu().clone() for tensor in model.state_dict().values()]


def same(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Say whether two lists of tensors have the same bits."""
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def train(session: Session, module: nn.Module, *, bad: tuple[int, ...] = (), **options: Any) -> list[torch.Tensor]:
    """Train with momentum; in the steps `bad`, worker 1 has no finite gradient."""
    model = DistributedModel(module, session=session, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    session.track(optimizer)
    leave_out, before = options.get("find_unused_parameters", False), session.counters.skipped_rounds
    for step in range(STEPS):
        optimizer.zero_grad()
        branch = ("left", "both", "right", "both", "left")[(step + session.rank) % 5] if leave_out else "both"
        loss = loss_of(model, step, session.rank, branch=branch)
        (loss * float("inf") if step in bad and session.rank == 1 else loss).backward()
        optimizer.step()
    assert session.counters.skipped_rounds == before + len(bad)
    return state(model)


class Sums(nn.Module):
    """Two parameters whose gradients are what is put in: the same bits on every device."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(draw(300, 300, seed=1))
        self.small = nn.Parameter(draw(17, seed=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a number."""
        return (self.large * x).sum() + (self.small * x[0, :17]).sum()


def train_sums(session: Session, where: str) -> list[torch.Tensor]:
    """Make five steps that every device computes without rounding differently; the third is skipped."""
    module = Sums()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(session.rank)
    model = DistributedModel(module.to(where), session=session)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    session.track(optimizer)
    gradients = []
    for step in range(5):
        optimizer.zero_grad()
        x = draw(300, 300, seed=10 * step + session.rank).to(where)
        (model(x) * (float("nan") if step == 2 and session.rank else 1.0)).backward()
        gradients += [parameter.grad.cpu().clone() for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
    assert session.counters.skipped_rounds == 1
    return [*gradients, *state(model)]
