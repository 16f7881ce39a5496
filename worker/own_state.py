"""What a worker keeps of its own between rounds: residuals and velocities, by tensor, so that they fit any number of servers.

A residual is what compression has left out so far. A run that is taken up without it loses that much of the gradient, once.
A velocity is the momentum of gradients that have it before they are compressed (`velocity.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from ps_accordion.codecs.base import FloatVector
from ps_accordion.errors import UsageError

from .exchange import Coder, Exchange

__all__ = ["VELOCITY", "load_residuals", "load_state", "load_velocities", "residuals_of", "state_of", "velocities_of"]

VELOCITY = "velocity."
"""What names of velocities begin with; those of residuals begin with a number."""


def state_of(exchanges: Iterable[Exchange]) -> dict[str, torch.Tensor]:
    """Return the residuals of several layouts, each tensor as `NUMBER.NAME` with its layout's number; see `residuals_of`.

    And velocities, as `velocity.NUMBER.NAME`.
    """
    state: dict[str, torch.Tensor] = {}
    for exchange in exchanges:
        state |= {f"{exchange.number}.{name}": residual for name, residual in residuals_of(exchange).items()}
        state |= {f"{VELOCITY}{exchange.number}.{name}": velocity for name, velocity in velocities_of(exchange).items()}
    return state


def load_state(exchanges: Sequence[Exchange], state: Mapping[str, torch.Tensor]) -> None:
    """Take over what `state_of` returned; see `load_residuals` and `load_velocities`.

    Raises:
        UsageError: It is of layouts or tensors that are not there.
    """
    residuals: dict[int, dict[str, torch.Tensor]] = {exchange.number: {} for exchange in exchanges}
    velocities: dict[int, dict[str, torch.Tensor]] = {exchange.number: {} for exchange in exchanges}
    for key, vector in state.items():
        number, _, name = key.removeprefix(VELOCITY).partition(".")
        if not number.isdecimal() or int(number) not in residuals:
            raise UsageError(
                f"expected residuals of {len(residuals)} models, got {key!r}; wrap the models before you load their state"
            )
        (velocities if key.startswith(VELOCITY) else residuals)[int(number)][name] = vector
    for exchange in exchanges:
        load_residuals(exchange, residuals[exchange.number])
        load_velocities(exchange, velocities[exchange.number])


def residuals_of(exchange: Exchange) -> dict[str, torch.Tensor]:
    """Return the residuals of a layout by tensor name, float32[elements] each, in the order of the tensor's memory; copies.

    Tensors without any are left out. No round may be open, and the codec threads must have nothing to do.
    """
    return _by_tensor(exchange, lambda coder: coder.host_residual())


def velocities_of(exchange: Exchange) -> dict[str, torch.Tensor]:
    """Return the velocities of a layout, as `residuals_of` returns residuals."""
    return _by_tensor(exchange, lambda coder: coder.host_velocity())


def load_residuals(exchange: Exchange, state: Mapping[str, torch.Tensor]) -> None:
    """Set the residuals of a layout; tensors that `state` does not name have none afterwards.

    Raises:
        UsageError: It names a tensor that the layout does not have, or has another number of elements.
    """
    for coder, residual in _by_key(exchange, state, "residuals"):
        if coder.host_residual() is not None or residual.any():
            coder.set_residual(residual)


def load_velocities(exchange: Exchange, state: Mapping[str, torch.Tensor]) -> None:
    """Set the velocities of a layout; tensors that `state` does not name have none afterwards.

    Raises:
        UsageError: As `load_residuals` does, or the codec of a tensor leaves momentum to the optimizer here.
    """
    for coder, velocity in _by_key(exchange, state, "velocities"):
        if coder.moves:
            coder.set_velocity(velocity)
        elif velocity.any():
            names = ", ".join(repr(exchange.layout.tensors[part.tensor].name) for part in coder.key.slices)
            raise UsageError(
                f"expected no momentum of {names}, whose codec leaves that to the optimizer here, got some; load it under the "
                f"codec that it was saved with, or leave out the entries that begin with {VELOCITY!r}"
            )


def _by_tensor(exchange: Exchange, vector_of: Callable[[Coder], FloatVector | None]) -> dict[str, torch.Tensor]:
    """Return a vector of each key, cut into tensors; those that are zero are left out."""
    tensors = exchange.layout.tensors
    found: dict[str, torch.Tensor] = {}
    for coder in exchange.coders:
        vector = vector_of(coder)
        if vector is None or not vector.any():
            continue
        for part in coder.key.slices:
            tensor = tensors[part.tensor]
            whole = found.setdefault(tensor.name, torch.zeros(tensor.elements))
            whole[part.start : part.start + part.length] = torch.from_numpy(vector[part.offset : part.offset + part.length])
    return found


def _by_key(exchange: Exchange, state: Mapping[str, torch.Tensor], what: str) -> Iterator[tuple[Coder, FloatVector]]:
    """Yield each key's coder with its vector, float32[key.elements], put together from tensors; zero where there is none."""
    sizes = {tensor.name: tensor.elements for tensor in exchange.layout.tensors}
    vectors: dict[str, FloatVector] = {}
    for name, tensor in state.items():
        if tensor.numel() != sizes.get(name):
            raise UsageError(
                f"expected {what} of the tensors that were saved, got {tensor.numel()} elements for {name!r}, which has "
                f"{sizes.get(name, 'no place')} here; load the state of the same model, after it was wrapped"
            )
        vectors[name] = tensor.detach().to("cpu", torch.float32).reshape(-1).numpy()
    names = [tensor.name for tensor in exchange.layout.tensors]
    for coder in exchange.coders:
        joined = np.zeros(coder.key.elements, np.float32)
        for part in coder.key.slices:
            vector = vectors.get(names[part.tensor])
            if vector is not None:
                joined[part.offset : part.offset + part.length] = vector[part.start : part.start + part.length]
        yield coder, joined
