"""A model's tensors as memory: flat gradients, and the bytes of parameters and buffers.

Bytes that lie on a device are copied to the host when training starts, and back if the model takes over another worker's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from ps_accordion.codecs.base import FloatVector
from ps_accordion.errors import UsageError

from .transfer import StateBytes

__all__ = ["Gradient", "HostGradient", "StateBytes", "device_of", "order_in_memory", "state_of"]

Gradient: TypeAlias = FloatVector | torch.Tensor
"""A tensor's gradient, [elements], contiguous: float32 on the host, or of any floating type where an exchange takes tensors."""


class HostGradient:
    """A flat gradient as float32 in host memory: the gradient itself where it lies there already, else a copy.

    Args:
        gradient: One dimension, contiguous, any device and floating type. It is overwritten.
        factor: What it is multiplied with first, in float32; None leaves it.

    Attributes:
        array: float32[elements].
    """

    def __init__(self, gradient: torch.Tensor, *, factor: torch.Tensor | None = None) -> None:
        self._gradient: torch.Tensor | None = None
        if gradient.device.type == "cpu" and gradient.dtype == torch.float32:
            if factor is not None:
                gradient.mul_(factor)
            self.array: FloatVector = gradient.numpy()
        else:
            self._gradient = gradient
            single = gradient.float()
            self.array = np.ascontiguousarray((single if factor is None else single * factor).cpu().numpy())

    def write_back(self) -> None:
        """Put the aggregate where the gradient was."""
        if self._gradient is not None:
            self._gradient.copy_(torch.from_numpy(self.array))


def order_in_memory(tensor: torch.Tensor) -> list[int]:
    """Return the axes of a tensor in the order in which they lie in memory, slowest first."""
    return sorted(range(tensor.dim()), key=lambda axis: -tensor.stride()[axis])


def device_of(named: Iterable[tuple[str, torch.Tensor]]) -> torch.device:
    """Return the device that all these tensors lie on; the CPU if there are none.

    Raises:
        UsageError: They lie on several.
    """
    first: tuple[str, torch.device] | None = None
    for name, tensor in named:
        if first is None:
            first = name, tensor.device
        elif tensor.device != first[1]:
            raise UsageError(
                f"parameter {first[0]!r} lies on {first[1]} and {name!r} on {tensor.device}: expected all parameters that are "
                "trained on one device; move them there, or wrap the parts of the model that lie apart as models of their own"
            )
    return torch.device("cpu") if first is None else first[1]


def state_of(module: nn.Module, *, copy_buffers: bool) -> StateBytes:
    """Return the memory of all parameters and buffers, the latter as copies if this worker hands them out.

    Parameters stand still until the first round, for which all must have them; a forward may change buffers before.
    Of tensors on a device these are copies on the host; `StateBytes.write_back` brings what was fetched to the device.

    Raises:
        UsageError: A tensor does not lie in one piece of memory, or has no values.
    """
    buffers = [(name, buffer.clone() if copy_buffers else buffer) for name, buffer in module.named_buffers()]
    tensors = [*module.named_parameters(), *buffers]
    description = "\n".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors)
    flat = [_flat(name, tensor) for name, tensor in tensors if tensor.numel()]
    here = [each.cpu() for each in flat]
    away = [(each, copy) for each, copy in zip(flat, here, strict=True) if copy is not each]
    return _State([each.view(torch.uint8).numpy() for each in here], description, away)


class _State(StateBytes):
    """The memory of tensors, some of them on a device, with copies of those."""

    def __init__(
        self,
        arrays: Sequence[np.ndarray[Any, np.dtype[np.uint8]]],
        description: str,
        away: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        super().__init__(arrays, description)
        self._away = away

    @torch.no_grad()
    def write_back(self) -> None:
        """See `StateBytes.write_back`."""
        for tensor, copy in self._away:
            tensor.copy_(copy)


def _flat(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's memory as one dimension, in the order in which it lies there."""
    data = tensor.detach()
    if data.is_meta:
        raise UsageError(f"{name!r} lies on the device meta, where tensors have no values; build the model on a real device")
    flat = data.permute(order_in_memory(data))
    if not flat.is_contiguous():
        raise UsageError(
            f"{name!r} does not lie in one piece of memory (strides {data.stride()}); call .contiguous() on it first"
        )
    return flat.reshape(-1)
