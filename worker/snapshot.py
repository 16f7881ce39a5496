"""What one worker must know of another's training to go on exactly like it.

Parameters, buffers, and of the optimizers, schedulers and scalers that step them: their state. In the safetensors format; what is
no tensor stands in it as JSON. Numbers, texts, None and lists of them are known; anything else stays as it is here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from ps_accordion.errors import WireError

from .training import Stepper, Training

__all__ = ["apply", "take"]

VALUES = "values"
PLAIN = (bool, int, float, str, type(None))


def take(module: nn.Module, training: Training) -> bytes:
    """Return the state of a model and of what steps it, as bytes.

    Args:
        module: The model.
        training: All that the session knows of; optimizers of other models are left out.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for name, tensor in _named(module):
        tensors[f"model.{name}"] = tensor
    for number, stepper in _steppers(module, training):
        for name, value in _optimizer_entries(stepper):
            key = f"optimizer.{number}.{name}"
            if isinstance(value, torch.Tensor):
                tensors[key] = value
            elif _plain(value):
                values[key] = value
        for kind, thing in (("scheduler", stepper.scheduler), ("scaler", stepper.scaler)):
            if thing is not None:
                values[f"{kind}.{number}"] = {name: value for name, value in thing.state_dict().items() if _plain(value)}
    # safetensors refuses tensors that share memory, and the caller goes on training: copies.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    copies[VALUES] = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    return save(copies)


@torch.no_grad()
def apply(blob: bytes, module: nn.Module, training: Training) -> None:
    """Take over what `take` returned in another worker.

    Raises:
        WireError: It is the state of another model or of other optimizers.
    """
    tensors = load(blob)
    values = json.loads(bytes(tensors.pop(VALUES).tolist()))
    for name, tensor in _named(module):
        tensor.copy_(_found(tensors, f"model.{name}"))
    for number, stepper in _steppers(module, training):
        prefix = f"optimizer.{number}."
        entries = {name.removeprefix(prefix): value for name, value in (tensors | values).items() if name.startswith(prefix)}
        if not entries:
            raise WireError(
                f"the worker whose state this one takes over knows of no optimizer number {number} of this model; track the same "
                "optimizers, in the same order, in every worker"
            )
        _set_optimizer(stepper, entries)
        for kind, thing in (("scheduler", stepper.scheduler), ("scaler", stepper.scaler)):
            state = values.get(f"{kind}.{number}")
            if thing is not None and state is not None:
                thing.load_state_dict(thing.state_dict() | state)


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
                group[name] = tuple(value) if isinstance(old, tuple) else value
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
        if isinstance(old, torch.Tensor) and isinstance(value, torch.Tensor):
            old.copy_(value)
        elif isinstance(value, torch.Tensor):
            # A counter of steps lies on the host, whatever the parameter does, unless kernels read it.
            counter = value.to(parameter.device) if counts_on_device else value
            mine[name] = counter if value.dim() == 0 else torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        else:
            mine[name] = value


def _found(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise WireError(f"the worker whose state this one takes over has no {name!r}; build the same model in every worker")
    return tensors[name]


def _plain(value: Any) -> bool:
    """Say whether JSON brings a value back as it was (but for tuples)."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(entry) for key, entry in value.items())
    return isinstance(value, PLAIN)
