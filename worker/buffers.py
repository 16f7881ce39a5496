"""Buffers that training changes, such as the running statistics of batch-norm: in every round all take those of one worker.

They travel as one exact vector in the round's results, from the worker that leads. After each round all workers have the same,
also after a skipped one, which leaves what the round before left.

These are the buffers of the `state_dict` of up to 32 floating-point bits that are finite when the model is wrapped. Others are
copied when training starts and when it joins: those that are not persistent are constants made anew, and integers count the same
everywhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as _preserve_versions

from ps_accordion.codecs.base import FloatVector
from ps_accordion.layout import Tensor

__all__ = ["Buffers"]

ROW_NAME = "*buffers*"
"""No parameter can be called that."""


class Buffers:
    """The buffers of one model that follow the lead.

    Args:
        module: The model.
        ignored: Names of buffers that are left alone.

    Attributes:
        moving: float32[elements], what the open round carries.
    """

    def __init__(self, module: nn.Module, ignored: Collection[str]) -> None:
        kept = module.state_dict(keep_vars=True)
        self._names = [name for name, buffer in module.named_buffers() if name in kept and name not in ignored and _moves(buffer)]
        self._places = [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in self._names]
        self.elements = sum(buffer.numel() for buffer in self._tensors)
        self.moving: FloatVector = np.zeros(self.elements, np.float32)
        self._agreed = np.zeros(self.elements, np.float32)
        device = next((buffer.device for buffer in self._tensors), torch.device("cpu"))
        self._beside = None if device.type == "cpu" else torch.empty(self.elements, dtype=torch.float32, device=device)
        """The vector where the buffers lie: one copy to the host and back, instead of one for each of them."""
        self._from_moving = _views(self._side(self.moving), self._tensors)
        self._from_agreed = _views(self._side(self._agreed), self._tensors)
        # What is loaded from a checkpoint between two rounds must not be taken back by a skipped one.
        for owner in {id(owner): owner for owner, _ in self._places}.values():  # a part of the model may be loaded alone
            owner.register_load_state_dict_post_hook(_Loaded(weakref.ref(self)))  # type: ignore[no-untyped-call]  # no hints there

    @property
    def _tensors(self) -> list[torch.Tensor]:
        # Looked up each time: a forward may put a new tensor in a buffer's place.
        return [cast(torch.Tensor, owner._buffers[name]) for owner, name in self._places]

    @property
    def row(self) -> Tensor:
        """Their row in the tensor table."""
        return Tensor(ROW_NAME, (self.elements,), "float32", buffer=True)

    @property
    def agreed(self) -> dict[str, torch.Tensor]:
        """What all workers agree on, by name in the module: views that the next round writes to."""
        return dict(zip(self._names, self._from_agreed, strict=True))

    def agree(self) -> None:
        """Take what the buffers hold now for what all workers have."""
        self.gather()
        self._agreed[:] = self.moving

    @torch.no_grad()
    def gather(self) -> bool:
        """Copy the buffers to `moving`; return whether they differ from what all agreed on.

        Where they lie on a device, this waits for it: call it when all that backward computes has been launched.
        """
        torch._foreach_copy_(self._from_moving, self._tensors)
        if self._beside is not None:
            torch.from_numpy(self.moving).copy_(self._beside)
        # Bits, not values: zeros have a sign, and what is not a number equals nothing.
        return not np.array_equal(self.moving.view(np.uint32), self._agreed.view(np.uint32))

    @torch.no_grad()
    def spread(self, *, moved: bool) -> None:
        """Set the buffers to what all workers agree on; with `moved` that is what `moving` holds now.

        A graph that is kept may hold a buffer that training reads only: writing it here is no change to that graph.
        """
        if moved:
            self._agreed[:] = self.moving
        if not self.gather():
            return
        tensors = tuple(self._tensors)
        if self._beside is not None:
            self._beside.copy_(torch.from_numpy(self._agreed))
        with _preserve_versions(tensors):
            torch._foreach_copy_(tensors, self._from_agreed)

    def _side(self, flat: FloatVector) -> torch.Tensor:
        return torch.from_numpy(flat) if self._beside is None else self._beside


class _Loaded:
    """Tells the buffers' owner, as long as there is one, that a state was loaded. A copied or pickled module has no owner."""

    def __init__(self, owner: weakref.ref[Buffers] | None = None) -> None:
        self._owner = owner

    def __call__(self, *_: object) -> None:
        owner = self._owner() if self._owner is not None else None
        if owner is not None:
            owner.agree()

    def __reduce__(self) -> tuple[type[_Loaded], tuple[()]]:
        return _Loaded, ()


def _moves(buffer: torch.Tensor) -> bool:
    if not buffer.is_floating_point() or buffer.dtype == torch.float64 or not buffer.numel():
        return False  # rounds carry float32: what holds more would come back rounded
    # What holds an infinity from the start is a constant, such as the mask of an attention; no round could carry it.
    return bool(torch.isfinite(buffer).all())


def _views(flat: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
