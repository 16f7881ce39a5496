"""Momentum that a worker gives gradients before they are compressed (`codecs/dgc.py` says why), key by key.

    u := momentum * u + gradient      what is encoded in place of the gradient
    u := 0 where the payload is not   if the codec of the payload is one with momentum: not where the key is sent as dense

u is the *velocity*. It is the tensor's: each slice of a fused key has its own momentum, or none, and one that was not used keeps
its velocity. A push that is not finite leaves it as it was. One that is taken back goes into the residual, and the velocity
stays: the gradient has been handed in. What is still in it when a worker leaves is not owed to anybody.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from ps_accordion.codecs import kernels, workspace
from ps_accordion.codecs.base import Codec, Coding, FloatVector, Payload
from ps_accordion.codecs.device import Advance
from ps_accordion.layout import Key, Slice

__all__ = ["DeviceVelocity", "Velocity"]


class Velocity:
    """The velocity of one key on the host. One thread at a time.

    Args:
        key: The key.
        momenta: Of each slice, in [0, 1).
    """

    def __init__(self, key: Key, momenta: Sequence[float]) -> None:
        self._key = key
        self._parts = _moving(key, momenta)
        self.vector: FloatVector | None = None
        """float32[key.elements]; None while it is zero."""
        self._next: FloatVector | None = None

    def advance(self, gradient: FloatVector, unused: Collection[Slice]) -> FloatVector:
        """Return what is handed in for a gradient; `keep` or `drop` says what becomes of that.

        Args:
            gradient: float32[key.elements], only read. Its unused slices hold anything.
            unused: Slices without a gradient.

        Returns:
            float32[key.elements], to be read until `keep` or `drop`.
        """
        old = workspace.zeros(gradient.size) if self.vector is None else self.vector
        self.vector, following = old, workspace.take(gradient.size)
        self._next = following
        if len(self._key.slices) == 1:
            ((_, momentum),) = self._parts
            kernels.momentum.advance(old, np.float32(momentum), gradient, following)
            return following
        np.copyto(following, old)
        handed_in = gradient.copy()
        for part, momentum in self._parts:
            if part not in unused:
                here = slice(part.offset, part.offset + part.length)
                kernels.momentum.advance(old[here], np.float32(momentum), gradient[here], following[here])
                handed_in[here] = following[here]
        return handed_in

    def keep(self, codec: Codec, payload: Payload, coding: Coding) -> None:
        """Note that what `advance` returned was encoded, into this payload."""
        assert self._next is not None
        assert self.vector is not None
        if codec.momentum:
            codec.mask(payload, coding, self._next)
        old, self.vector, self._next = self.vector, self._next, None
        workspace.give(old)

    def drop(self) -> None:
        """Note that it was not: the velocity is what it was."""
        assert self._next is not None
        workspace.give(self._next)
        self._next = None


class DeviceVelocity:
    """The velocity of one key on a torch device.

    Args:
        key: The key.
        momenta: Of each slice, in [0, 1).
    """

    def __init__(self, key: Key, momenta: Sequence[float]) -> None:
        self._key = key
        self._parts = _moving(key, momenta)
        self.vector: torch.Tensor | None = None
        """float32[key.elements], on the device once the first gradient is known; None while it is zero."""

    def advance(self, gradient: torch.Tensor, unused: Collection[Slice]) -> tuple[torch.Tensor, Advance]:
        """Return what is handed in for a gradient, and what the velocity becomes; the host does not wait.

        Args:
            gradient: [key.elements] of any floating type, only read. Its unused slices hold anything.
            unused: Slices without a gradient.

        Returns:
            float32[key.elements], and what `device.encode` takes to change the velocity, in place.
        """
        old = self._on(gradient.device)
        gradient = gradient.to(torch.float32)
        if len(self._key.slices) == 1:
            ((_, momentum),) = self._parts
            following = torch.mul(old, momentum).add_(gradient)
            return following, Advance(old, following)
        following, handed_in = old.clone(), gradient.clone()
        for part, momentum in self._parts:
            if part not in unused:
                here = slice(part.offset, part.offset + part.length)
                following[here].mul_(momentum).add_(gradient[here])
                handed_in[here] = following[here]
        return handed_in, Advance(old, following)

    def _on(self, device: torch.device) -> torch.Tensor:
        if self.vector is None:
            self.vector = torch.zeros(self._key.elements, dtype=torch.float32, device=device)
        elif self.vector.device != device:
            self.vector = self.vector.to(device)
        return self.vector


def _moving(key: Key, momenta: Sequence[float]) -> list[tuple[Slice, float]]:
    """Return the slices that have momentum, with it."""
    return [(part, momentum) for part, momentum in zip(key.slices, momenta, strict=True) if momentum]
