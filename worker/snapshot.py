"""What one worker must know of another's training to go on exactly like it.

Parameters, buffers, and of the optimizers, schedulers and scalers that step them: their state. In the safetensors format; what is
no tensor stands in it as JSON, as far as `plain.py` can carry it; functions and the like stay as they are here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from ps_accordion.errors import UsageError, WireError

from .plain import is_plain, merged, packed
from .training import Stepper, Training

__all__ = ["apply", "take"]

VALUES = "values"


def take(module: nn.Module, training: Training, *, instead: Mapping[str, torch.Tensor] | None = None) -> bytes:
    """Return the state of a model and of what steps it, as bytes.

    Args:
        module: The model.
        training: All that the session knows of; optimizers of other models are left out.
        instead: Tensors that stand for buffers of these names, which may be about to change.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for name, tensor in _named(module):
        tensors[f"model.{name}"] = (instead or {}).get(name, tensor)
    for number, stepper in _steppers(module, training):
        for name, value in _optimizer_entries(stepper):
            key = f"optimizer.{number}.{name}"
            if isinstance(value, torch.Tensor):
                tensors[key] = value
            elif is_plain(value):
                values[key] = packed(value)
            elif name.startswith("state."):
                raise UsageError(
                    f"the state {name!r} of {type(stepper.optimizer).__name__} is a {type(value).__name__}, which other workers "
                    "cannot take over; use an optimizer whose state is tensors and numbers, or give all workers the same number "
                    "of batches and leave join() out"
                )
        for kind, thing in (("scheduler", stepper.scheduler), ("scaler", stepper.scaler)):
            if thing is not None:
                values[f"{kind}.{number}"] = packed(thing.state_dict())
    # safetensors refuses tensors that share memory, and the caller goes on training: copies.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    copies[VALUES] = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    return save(copies)


@torch.no_grad()
def apply(blob: bytes, module: nn.Module, training: Training) -> None:
    """Take over what `take` returned in another worker.

    Raises:
        WireError: It is the state of another model.
        UsageError: Other optimizers or schedulers step the model there.
    """
    tensors = load(blob)
    values = json.loads(bytes(tensors.pop(VALUES).tolist()))
    for name, tensor in _named(module):
        tensor.copy_(_found(tensors, f"model.{name}"))
    steppers = dict(_steppers(module, training))
    theirs = {int(name.split(".")[1]) for name in (*tensors, *values) if name.startswith("optimizer.")}
    if theirs - steppers.keys():
        raise UsageError(
            f"the worker whose state this one takes over steps this model with {len(theirs)} optimizers, and this one knows "
            f"{len(steppers)}: call session.track(optimizer) for each, in every worker, before the first batch"
        )
    for number, stepper in steppers.items():
        prefix = f"optimizer.{number}."
        entries = {name.removeprefix(prefix): value for name, value in (tensors | values).items() if name.startswith(prefix)}
        if not entries:
            raise UsageError(
                f"the worker whose state this one takes over knows of no optimizer number {number} of this model; track the same "
                "optimizers, in the same order, in every worker"
            )
        _check_rates(stepper, entries)
        _set_optimizer(stepper, entries)
        for kind, thing in (("scheduler", stepper.scheduler), ("scaler", stepper.scaler)):
            state = values.get(f"{kind}.{number}")
            if thing is not None and state is not None:
                thing.load_state_dict(merged(thing.state_dict(), state))


def _named(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _steppers(module: nn.Module, training: Training) -> Iterator[tuple[int, Stepper]]:
    mine = {id(parameter) for parameter in module.parameters()}
    stepping = [
        stepper
        for stepper in training.steppers
        if any(id(parameter) in mine for group in stepper.optimizer.param_groups for parameter in group["params"])
    ]
    yield from enumerate(stepping)


def _optimizer_entries(stepper: Stepper) -> Iterator[tuple[str, Any]]:
    """Yield `state.<parameter>.<name>` and `group.<group>.<name>` with their values."""
    number = 0
    for group_number, group in enumerate(stepper.optimizer.param_groups):
        for name, value in group.items():
            if name != "params":
                yield f"group.{group_number}.{name}", value
        for parameter in group["params"]:
            for name, value in stepper.optimizer.state.get(parameter, {}).items():
                yield f"state.{number}.{name}", value
            number += 1


def _check_rates(stepper: Stepper, entries: dict[str, Any]) -> None:
    """Refuse a scheduler that nobody tracked, and that has stepped more often there than here."""
    for number, group in enumerate(stepper.optimizer.param_groups):
        here, there = float(group["lr"]), float(entries[f"group.{number}.lr"])
        if "initial_lr" in group and stepper.scheduler is None and here != there:
            raise UsageError(
                f"a scheduler has set the learning rate to {there:g} in the worker whose state this one takes over, and to "
                f"{here:g} here: track it, session.track(optimizer, scheduler=scheduler)"
            )


def _set_optimizer(stepper: Stepper, entries: dict[str, Any]) -> None:
    optimizer = stepper.optimizer
    number = 0
    states: dict[int, dict[str, Any]] = {}
    for key, value in entries.items():
        kind, position, name = key.split(".", 2)
        if kind == "group":
            group = optimizer.param_groups[int(position)]
            old = group.get(name)
            if isinstance(old, torch.Tensor):
                old.copy_(value)
            else:
                group[name] = merged(old, value)
        else:
            states.setdefault(int(position), {})[name] = value
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            on_device = bool(group.get("capturable") or group.get("fused"))
            _set_state(optimizer, parameter, states.get(number, {}), counts_on_device=on_device)
            number += 1


def _set_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, Any], *, counts_on_device: bool
) -> None:
    if not state:
        optimizer.state.pop(parameter, None)
        return
    mine = optimizer.state[parameter]
    for name, value in state.items():
        old = mine.get(name)
        if isinstance(old, torch.Tensor) and isinstance(value, torch.Tensor) and old.shape == value.shape:
            old.copy_(value)
        elif isinstance(value, torch.Tensor):
            # A counter of steps lies on the host, whatever the parameter does, unless kernels read it.
            if value.dim() == 0:
                mine[name] = value.to(parameter.device) if counts_on_device else value
            elif value.shape == parameter.shape:
                mine[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            else:
                mine[name] = value.to(parameter.device)
        else:
            mine[name] = merged(old, value)


def _found(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise WireError(f"the worker whose state this one takes over has no {name!r}; build the same model in every worker")
    return tensors[name]
