"""What a worker keeps of its own between rounds: residuals, by tensor, so that they fit any number of servers.

A residual is what compression has left out so far. A run that is taken up without it loses that much of the gradient, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from ps_accordion.codecs.base import FloatVector
from ps_accordion.errors import UsageError

from .exchange import Exchange

__all__ = ["load_residuals", "load_state", "residuals_of", "state_of"]


def state_of(exchanges: Iterable[Exchange]) -> dict[str, torch.Tensor]:
    """Return the residuals of several layouts, each tensor as `NUMBER.NAME` with its layout's number; see `residuals_of`."""
    return {f"{exchange.number}.{name}": residual for exchange in exchanges for name, residual in residuals_of(exchange).items()}


def load_state(exchanges: Sequence[Exchange], state: Mapping[str, torch.Tensor]) -> None:
    """Take over what `state_of` returned; see `load_residuals`.

    Raises:
        UsageError: It is of layouts or tensors that are not there.
    """
    parts: dict[int, dict[str, torch.Tensor]] = {exchange.number: {} for exchange in exchanges}
    for key, residual in state.items():
        number, _, name = key.partition(".")
        if not number.isdecimal() or int(number) not in parts:
            raise UsageError(
                f"expected residuals of {len(parts)} models, got {key!r}; wrap the models before you load their state"
            )
        parts[int(number)][name] = residual
    for exchange in exchanges:
        load_residuals(exchange, parts[exchange.number])


def residuals_of(exchange: Exchange) -> dict[str, torch.Tensor]:
    """Return the residuals of a layout by tensor name, float32[elements] each, in the order of the tensor's memory; copies.

    Tensors without any are left out. No round may be open, and the codec threads must have nothing to do.
    """
    tensors = exchange.layout.tensors
    found: dict[str, torch.Tensor] = {}
    for coder in exchange.coders:
        residual = coder.host_residual()
        if residual is None or not residual.any():
            continue
        for part in coder.key.slices:
            tensor = tensors[part.tensor]
            whole = found.setdefault(tensor.name, torch.zeros(tensor.elements))
            whole[part.start : part.start + part.length] = torch.from_numpy(residual[part.offset : part.offset + part.length])
    return found


def load_residuals(exchange: Exchange, state: Mapping[str, torch.Tensor]) -> None:
    """Set the residuals of a layout; tensors that `state` does not name have none afterwards.

    Raises:
        UsageError: It names a tensor that the layout does not have, or has another number of elements.
    """
    sizes = {tensor.name: tensor.elements for tensor in exchange.layout.tensors}
    vectors: dict[str, FloatVector] = {}
    for name, tensor in state.items():
        if tensor.numel() != sizes.get(name):
            raise UsageError(
                f"expected residuals of the tensors that were saved, got {tensor.numel()} elements for {name!r}, which has "
                f"{sizes.get(name, 'no place')} here; load the state of the same model, after it was wrapped"
            )
        vectors[name] = tensor.detach().to("cpu", torch.float32).reshape(-1).numpy()
    names = [tensor.name for tensor in exchange.layout.tensors]
    for coder in exchange.coders:
        residual = np.zeros(coder.key.elements, np.float32)
        for part in coder.key.slices:
            vector = vectors.get(names[part.tensor])
            if vector is not None:
                residual[part.offset : part.offset + part.length] = vector[part.start : part.start + part.length]
        if coder.host_residual() is not None or residual.any():
            coder.set_residual(residual)
