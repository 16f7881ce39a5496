"""dgc: topk on momentum instead of gradients (Lin, Han, Mao, Wang and Dally, ICLR 2018, sections 3.1 and 3.3).

With feedback alone, a small gradient waits in the residual and skips the momentum that the optimizer would have given it since.
So the worker builds momentum up before it encodes, and the optimizer has none (algorithm 4, per worker and tensor):

    u := momentum * u + gradient        the velocity, which is what the worker hands in
    v  = u + residual                   payload = C(v);  residual := v - D(payload)
    u := 0 where D(payload) is not 0    momentum factor masking: what has waited for long carries no stale momentum on

That is the worker's business (`worker/velocity.py`), and belongs to the tensor: it goes on where a key is sent as dense, because
that is cheaper or the tensor is small, but then nothing waits, and masking would leave no momentum at all: there is none.
Here is what masks. The payload is that of `topk`, at workers and servers: see there, and `codecs/entries.py`.
The paper's warm-up of the ratio is what a regime is for, and its clipping needs the norm of the whole model before a push: clip
what `backward` leaves instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import CodecError
from . import kernels, values
from .base import Coding, FloatVector, Payload
from .entries import is_packed, packed_entries, positions_of
from .topk import TopK

__all__ = ["DGC"]


@dataclass(frozen=True)
class DGC(TopK):
    """The largest elements of accumulated momentum. Level: the fraction that is kept, in (0, 1].

    Attributes:
        momentum: Of the velocity, from 0, which makes it `topk`, to below 1.
    """

    name: ClassVar[str] = "dgc"
    adds_as_topk: ClassVar[bool] = True

    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Refuse a number format that does not exist, and a momentum that grows for ever."""
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise CodecError(f"{self.name}: expected a momentum from 0 to below 1, got {self.momentum!r}")

    def mask(self, payload: Payload, coding: Coding, velocity: FloatVector) -> None:
        """Set zero where an entry is not zero; see `Codec.mask`."""
        if is_packed(payload):
            packed = packed_entries(payload, coding)
            kernels.momentum.clear_packed(packed.entries, packed.counts, velocity)
            return
        places, counts = positions_of(payload, coding.elements, coding.count)
        kernels.momentum.clear(values.load(payload, coding.count), places, counts, velocity)
