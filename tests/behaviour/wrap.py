"""What a training script says differently under DistributedDataParallel and under ours, and what a row of the table notes.

tests of one kind ──> rows of scenarios ──> run.py under DDP, and under ps-accordion ──> the same notes?
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["LOCAL", "REPLICA", "STEPS", "Attached", "Notes", "Ours", "Rows", "Theirs", "Wrap", "draw", "sgd", "train"]

STEPS = 10
LOCAL = "local."
"""Begins the names of what may differ between ranks. It is compared rank by rank; all else must be the same on every rank."""
REPLICA = "replica."
"""Begins the names of what must be the same on every rank, and is not compared with DistributedDataParallel."""


class Wrap(ABC):
    """A script's way to its distributed model.

    Attributes:
        rank: This process, from 0.
        world_size: How many take part.
        keeps_what_is_skipped: Whether finite gradients of a skipped step come with the next one.
    """

    rank: int
    world_size: int
    keeps_what_is_skipped: bool

    @abstractmethod
    def model(self, module: nn.Module, **options: Any) -> DistributedDataParallel:
        """Wrap a model."""

    def track(self, optimizer: torch.optim.Optimizer, **options: Any) -> None:  # noqa: B027  # nothing to say to DDP
        """Tell the run what the script steps with."""


class Theirs(Wrap):
    """DistributedDataParallel over gloo.

    Args:
        rank: This process.
        world_size: How many take part.
        folder: Where they meet.
    """

    keeps_what_is_skipped = False

    def __init__(self, rank: int, world_size: int, folder: Path) -> None:
        self.rank, self.world_size = rank, world_size
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)

    def model(self, module: nn.Module, **options: Any) -> DistributedDataParallel:
        """Wrap a model."""
        return DistributedDataParallel(module, **options)


class Ours(Wrap):
    """ps-accordion.

    Args:
        session: This worker's session, which `connect` made.
    """

    keeps_what_is_skipped = True

    def __init__(self, session: Any) -> None:
        self.session = session
        self.rank, self.world_size = session.rank, session.world_size

    def model(self, module: nn.Module, **options: Any) -> DistributedDataParallel:
        """Wrap a model, which finds the session by itself."""
        from ps_accordion.worker import DistributedModel

        return DistributedModel(module, **options)

    def track(self, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        """Tell the run what the script steps with."""
        self.session.track(optimizer, **options)


class Attached(Ours):
    """DistributedDataParallel over gloo, whose gradients go through ps-accordion.

    Args:
        session: This worker's session.
        folder: Where the ranks meet.
    """

    def __init__(self, session: Any, folder: Path) -> None:
        super().__init__(session)
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=session.rank, world_size=session.world_size)

    def model(self, module: nn.Module, **options: Any) -> DistributedDataParallel:
        """Wrap a model as always, then attach."""
        from ps_accordion.worker import attach

        model = DistributedDataParallel(module, **options)
        attach(model)
        return model


Row = Callable[[Wrap], dict[str, Tensor]]
RowOf = Callable[[Wrap, Any], dict[str, Tensor]]


class Rows(dict[str, Row]):
    """Rows by name, in order of definition. An instance is a decorator that adds one, made for each of some arguments."""

    def __call__(self, row: Row) -> Row:
        """Add a row."""
        assert row.__name__ not in self, row.__name__
        self[row.__name__] = row
        return row

    def over(self, **cases: Any) -> Callable[[RowOf], RowOf]:
        """Add a row for each case: its name is added to the row's, its value is the second argument."""

        def add(row: RowOf) -> RowOf:
            for name, value in cases.items():
                self[f"{row.__name__}_{name}"] = lambda wrap, value=value: row(wrap, value)  # type: ignore[misc]
            return row

        return add


class Notes:
    """What a row notes down. Tensors are copied.

    Attributes:
        tensors: By name. A gradient that is None is left out, so that the names tell.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Note what must be the same on every rank."""
        assert name not in self.tensors, name
        self.tensors[name] = torch.as_tensor(value).detach().clone().contiguous()

    def local(self, name: str, value: Tensor | float) -> None:
        """Note what is this rank's own."""
        self.add(LOCAL + name, value)

    def gradients(self, when: object, model: nn.Module, what: str = "gradient") -> None:
        """Note all gradients."""
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.add(f"{what}.{when}.{name}", parameter.grad)

    def state(self, model: nn.Module, what: str = "state") -> None:
        """Note parameters and persistent buffers."""
        for name, tensor in model.state_dict().items():
            self.add(f"{what}.{name}", tensor)


def draw(*shape: int, seed: int) -> Tensor:
    """Return random numbers that depend on nothing else."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of most rows."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def train(
    wrap: Wrap,
    module: nn.Module,
    loss_of: Callable[[Callable[..., Any], int, int], Tensor],
    *,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = sgd,
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    set_to_none: bool = True,
    notes: Notes | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Train as a script does, and note every gradient and loss and the final state.

    Args:
        wrap: The way to the distributed model.
        module: The model.
        loss_of: Returns the loss of (model, step, rank).
        optimizer: Makes one.
        around: What the forward runs in.
        set_to_none: What `zero_grad` does.
        notes: Where to note; None begins anew.
        options: Options of DistributedDataParallel.
    """
    notes = notes or Notes()
    model = wrap.model(module, **options)
    stepper = optimizer(p for p in model.parameters() if p.requires_grad)
    for step in range(STEPS):
        stepper.zero_grad(set_to_none=set_to_none)
        with around():
            loss = loss_of(model, step, wrap.rank)
        loss.backward()
        notes.local(f"loss.{step}", loss)
        notes.gradients(step, model)
        stepper.step()
    notes.state(model)
    return notes.tensors
