"""What the tests of the device path share: the devices that there are, and a ban on all that makes the host wait for one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ps_accordion.codecs.device import host_memory

__all__ = ["DEVICES", "NoSync", "Seen", "Synchronised", "offences", "watched_by_torch"]

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else [])]
"""Where parity is checked. Without a GPU there are no tests that need one: none that could pass, and none that is skipped."""

_aten = torch.ops.aten
_READS = {
    _aten._local_scalar_dense,  # .item(), float(), int(), bool(), if tensor: ...
    _aten.is_nonzero,
    _aten.equal,
    _aten.nonzero,
    _aten.nonzero_numpy,
    _aten.argwhere,
    _aten.masked_select,
    _aten.unique_dim,
    _aten._unique,
    _aten._unique2,
    _aten.unique_consecutive,
    _aten.bincount,
}
"""What reads a scalar from a tensor, or has a result whose length depends on what a tensor holds."""
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index}
_COPIES = {_aten._to_copy, _aten.copy_, _aten.copy}


class Synchronised(AssertionError):
    """Something that makes the host wait for a device was called."""


class NoSync(TorchDispatchMode):
    """Refuse operations that make the host wait for a device.

    On CPU tensors it sees the operations that read. Tensors on `meta` stand for those of a device where there is none, so that it
    sees copies too; a copy from `meta` to the host, which torch cannot make, is counted and left out.

    Args:
        parcels: How many copies from the device to the host are fine: of bytes, and not waited for.

    Attributes:
        fetched: Bytes of each of those copies.
    """

    def __init__(self, parcels: int = 0) -> None:
        super().__init__()
        self.fetched: list[int] = []
        self._parcels = parcels

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at one operation, then let it run."""
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in _READS:
            raise Synchronised(f"{func} reads what a tensor holds")
        if packet is _aten.repeat_interleave and kwargs.get("output_size") is None:
            raise Synchronised(f"{func} without output_size reads how long its result is")
        if packet in _INDEXING and any(_is_mask(index) for index in args[1]):
            raise Synchronised(f"{func} with a mask reads how many elements it names")
        if packet in _COPIES and self._is_fetch(func, args, kwargs):
            return args[0]
        return func(*args, **kwargs)

    def _is_fetch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a copy is a parcel that nothing can be copied of; raise where the host would wait for a copy."""
        if func.overloadpacket is _aten._to_copy:
            source, target = args[0], kwargs.get("device") or args[0].device
            waits = not kwargs.get("non_blocking", False)
        else:
            source, target = args[1], args[0].device
            waits = not (kwargs.get("non_blocking", False) or (len(args) > 2 and args[2]))
        if source.device.type == target.type:
            return False
        if target.type != "cpu":
            # A number in a tensor of its own on the host goes with the launch; anything else must not be waited for.
            if waits and source.dim():
                raise Synchronised(f"{func} copies to the device, and waits for it")
            return False
        if waits or source.dtype != torch.uint8 or len(self.fetched) == self._parcels:
            raise Synchronised(
                f"{func} copies {source.dtype}{list(source.shape)} to the host (after {len(self.fetched)} parcels)"
            )
        self.fetched.append(source.numel())
        return source.is_meta


@contextmanager
def watched_by_torch() -> Iterator[None]:
    """Let torch refuse what makes the host wait for a GPU, which it sees more of than we list, in all threads of the process."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Seen:
    """Streams of a device that is not there: marks may be waited for by codec threads only."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def mark(self) -> Seen:
        """Note it."""
        self.log.append("mark")
        return self

    def synchronize(self) -> None:
        """Note that somebody waits."""
        self.log.append("wait")

    def fetch(self, tensor: torch.Tensor) -> tuple[np.ndarray, Seen]:
        """Copy as a device with streams does."""
        memory = host_memory(tensor.numel(), torch.device("cpu"))
        memory.copy_(tensor, non_blocking=True)
        return memory.zero_().numpy(), self.mark()

    def follow(self, mark: Seen) -> None:
        """Do not wait: the device does."""

    def recorded(self, work: Callable[[], torch.Tensor]) -> None:
        """Say that there is no way."""

    @contextmanager
    def aside(self, after: Seen | None) -> Iterator[None]:
        """Note what is run elsewhere, and what it comes after."""
        self.log.append("aside after a mark" if after else "aside")
        yield
        self.log.append("wait")


def _is_mask(index: Any) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def offences() -> dict[str, Callable[[torch.Tensor], Any]]:
    """Return calls that make the host wait, by name: each takes float32[n > 1]."""
    return {
        "item": lambda x: x.sum().item(),
        "float": lambda x: float(x[0]),
        "if": lambda x: 1 if x[0] > 0 else 2,
        "nonzero": lambda x: torch.nonzero(x),
        "where": lambda x: torch.where(x > 0),
        "argwhere": lambda x: torch.argwhere(x),
        "mask": lambda x: x[x > 0],
        "write to a mask": lambda x: x.__setitem__(x > 0, torch.ones_like(x[:1])),
        "masked_select": lambda x: torch.masked_select(x, x > 0),
        "equal": lambda x: torch.equal(x, x + 1),
        "unique": lambda x: torch.unique(x),
        "repeat_interleave": lambda x: torch.repeat_interleave((x > 0).to(torch.int64)),
    }
