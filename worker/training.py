"""What a training script steps with: optimizers, schedulers, scalers and samplers, as far as the run must know them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ps_accordion.errors import UsageError

__all__ = ["Stepper", "Training"]


@dataclass
class Stepper:
    """An optimizer with what belongs to it.

    Attributes:
        optimizer: The optimizer.
        scheduler: What sets its learning rate, or None.
        scaler: What scales the loss of its parameters, or None.
    """

    optimizer: Optimizer
    scheduler: Any = None
    scaler: torch.amp.GradScaler | None = None


class Training:
    """The optimizers of one session.

    An optimizer that steps parameters of our models is known from its first step on, even if nobody has tracked it: its learning
    rate then counts from the step after. `track` makes it known at once, and with it what only the script can say.

    Args:
        begin_epoch: Called with the number of an epoch when a tracked sampler begins one.
    """

    def __init__(self, begin_epoch: Callable[[int], None]) -> None:
        self.steppers: list[Stepper] = []
        self.multiplier = 1
        """Batches that make up the step in progress: learning rates are that many times as high while an optimizer steps."""
        self._begin_epoch = begin_epoch
        self._parameters: set[int] = set()
        self._momenta: dict[int, tuple[str, float]] = {}
        """Name and momentum of parameters whose gradients are given momentum before they are compressed, by id."""
        self._scalers: dict[int, torch.amp.GradScaler] = {}
        self._rates: list[tuple[Optimizer, list[Any]]] = []
        me = weakref.ref(self)
        self._watch = register_optimizer_step_pre_hook(lambda optimizer, *_: _notice(me, optimizer))
        self._scaling: list[Any] = []

    def trains(self, named: Iterable[tuple[str, nn.Parameter]], momenta: Mapping[str, float]) -> None:
        """Note that a model of this session has these parameters.

        Args:
            named: The parameters with their names.
            momenta: Momentum that gradients are given before they are compressed, by name.

        Raises:
            UsageError: An optimizer that is known gives momentum to one of these, too.
        """
        for name, parameter in named:
            self._parameters.add(id(parameter))
            if name in momenta:
                self._momenta[id(parameter)] = name, momenta[name]
        for stepper in self.steppers:
            self._refuse_momentum(stepper.optimizer)

    def track(
        self, optimizer: Optimizer, *, scheduler: Any = None, scaler: torch.amp.GradScaler | None = None, sampler: Any = None
    ) -> None:
        """Take note of an optimizer; see `BaseSession.track`.

        Raises:
            UsageError: The scheduler is another optimizer's, the sampler has no epochs, or the optimizer gives momentum to what
                has been given it before.
        """
        self._refuse_momentum(optimizer)
        if scheduler is not None and getattr(scheduler, "optimizer", optimizer) is not optimizer:
            raise UsageError("expected a scheduler of the tracked optimizer, got one of another optimizer")
        if sampler is not None and not callable(getattr(sampler, "set_epoch", None)):
            raise UsageError(
                f"expected a sampler with set_epoch, got {type(sampler).__name__}; call session.begin_epoch(epoch) instead"
            )
        known = next((known for known in self.steppers if known.optimizer is optimizer), None)
        if known is None:
            self.steppers.append(Stepper(optimizer, scheduler, scaler))
            self._hook(optimizer)
        else:
            known.scheduler, known.scaler = scheduler or known.scheduler, scaler or known.scaler
        if scaler is not None and scaler.is_enabled():
            for group in optimizer.param_groups:
                self._scalers.update((id(parameter), scaler) for parameter in group["params"])
        if sampler is not None:
            self._mark_epochs(sampler)

    def _mark_epochs(self, sampler: Any) -> None:
        inner = sampler.set_epoch

        def set_epoch(epoch: int) -> None:
            inner(epoch)
            self._begin_epoch(epoch)

        sampler.set_epoch = set_epoch

    @property
    def scales(self) -> bool:
        """Whether some tracked scaler scales a loss."""
        return bool(self._scalers)

    def scaler_of(self, parameter: nn.Parameter) -> torch.amp.GradScaler | None:
        """Return the enabled scaler that scales this parameter's gradient, if one was tracked."""
        return self._scalers.get(id(parameter))

    def rate(self, parameters: Container[int] | None = None) -> float:
        """Return the learning rate that the next step uses (the largest of all groups), NaN where no optimizer is known.

        Args:
            parameters: Ids of the parameters that count; None counts all.
        """
        rates = []
        for stepper in self.steppers:
            raised = next((rates for known, rates in self._rates if known is stepper.optimizer), None)
            for number, group in enumerate(stepper.optimizer.param_groups):
                if parameters is None or any(id(parameter) in parameters for parameter in group["params"]):
                    rates.append(float(group["lr"] if raised is None else raised[number]))
        return max(rates, default=math.nan)

    def notice(self, optimizer: Optimizer) -> None:
        """Take note of an optimizer that is about to step, if it steps a model of this session.

        Raises:
            UsageError: It gives momentum to what has been given it before.
        """
        if all(known.optimizer is not optimizer for known in self.steppers) and any(
            id(parameter) in self._parameters for group in optimizer.param_groups for parameter in group["params"]
        ):
            self._refuse_momentum(optimizer)
            self.steppers.append(Stepper(optimizer))
            self._hook(optimizer)
            self._raise(optimizer)  # this step has begun already

    def _refuse_momentum(self, optimizer: Optimizer) -> None:
        """Refuse momentum on top of momentum: with 0.9 twice, every step would be ten times as long again."""
        for group in optimizer.param_groups:
            momentum = float(group.get("momentum", 0) or group.get("betas", (0,))[0])
            for parameter in group["params"] if momentum else ():
                if id(parameter) in self._momenta:
                    name, before = self._momenta[id(parameter)]
                    raise UsageError(
                        f"expected an optimizer without momentum for {name!r}, whose gradient is given {before:g} before it is "
                        f"compressed (codec.momentum), got {type(optimizer).__name__} with {momentum:g}: set momentum=0 there "
                        "(for Adam, the first of betas), or choose a codec that leaves it to the optimizer, such as topk"
                    )

    def _hook(self, optimizer: Optimizer) -> None:
        self._scaling += [
            optimizer.register_step_pre_hook(lambda optimizer, *_: self._raise(optimizer)),
            optimizer.register_step_post_hook(lambda optimizer, *_: self._lower(optimizer)),
        ]

    def _raise(self, optimizer: Optimizer) -> None:
        if self.multiplier == 1 or any(known is optimizer for known, _ in self._rates):
            return
        self._rates.append((optimizer, [group["lr"] for group in optimizer.param_groups]))
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.multiplier

    def _lower(self, optimizer: Optimizer) -> None:
        for known, rates in self._rates:
            if known is optimizer:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
        self._rates = [(known, rates) for known, rates in self._rates if known is not optimizer]

    def end_step(self) -> None:
        """End a step of several batches: rates are what they were, even if the optimizer failed."""
        self.multiplier = 1
        for optimizer, _ in list(self._rates):
            self._lower(optimizer)

    def close(self) -> None:
        """Forget the optimizers: their hooks are removed."""
        self._watch.remove()
        for handle in self._scaling:
            handle.remove()


def _notice(me: weakref.ref[Training], optimizer: Optimizer) -> None:
    training = me()
    if training is not None:
        training.notice(optimizer)
