"""The initial state of a model, from the worker of the lowest slot to all others.

The state is the bytes of all parameters and buffers, one after the other, cut into parts.
Joiners ask for parts through the servers, some at a time, and again after a while for those that did not come.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from ps_accordion.config import Settings
from ps_accordion.errors import LayoutError
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Peer, Send

from .rounds import server_name

__all__ = ["Donor", "Joiner", "StateBytes"]

PART_BYTES = 1 << 20
IN_FLIGHT = 8
"""Parts asked for at a time: enough to fill a link with 8 MiB in flight, without holding the model in queues."""
ASK_AGAIN_S = 1.0

Bytes = NDArray[np.uint8]


class StateBytes:
    """The memory of a model's tensors as one run of bytes.

    Args:
        arrays: uint8 views of the tensors, in an order that all workers share. They are read and written in place.
        description: Names, shapes and types of these tensors, in the same order.
    """

    def __init__(self, arrays: Sequence[Bytes], description: str) -> None:
        self._arrays = list(arrays)
        self._starts = np.cumsum([0, *(array.nbytes for array in arrays)]).tolist()
        self.digest = xxhash.xxh3_64_hexdigest(description.encode())

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return int(self._starts[-1])

    @property
    def parts(self) -> int:
        """How many parts it is cut into; at least one."""
        return max(1, -(-self.nbytes // PART_BYTES))

    def _spans(self, part: int) -> list[tuple[Bytes, int]]:
        """Return (memory, offset within the part) of every tensor that has bytes in `part`."""
        low, high = part * PART_BYTES, min((part + 1) * PART_BYTES, self.nbytes)
        spans = []
        for array, start in zip(self._arrays, self._starts, strict=False):
            first, last = max(low, start), min(high, start + array.nbytes)
            if first < last:
                spans.append((array[first - start : last - start], first - low))
        return spans

    def read(self, part: int) -> Bytes:
        """Return a copy of one part."""
        spans = self._spans(part)
        out = np.empty(sum(memory.nbytes for memory, _ in spans), np.uint8)
        for memory, offset in spans:
            out[offset : offset + memory.nbytes] = memory
        return out

    def write(self, part: int, data: Bytes) -> None:
        """Write one part into the tensors.

        Raises:
            LayoutError: It has another length than this part has here.
        """
        spans = self._spans(part)
        expected = sum(memory.nbytes for memory, _ in spans)
        if data.nbytes != expected:
            raise LayoutError(f"part {part} of the model's state has {data.nbytes} bytes there and {expected} here")
        for memory, offset in spans:
            memory[:] = data[offset : offset + memory.nbytes]


class Donor:
    """Answers requests for the parts of one layout's state."""

    def __init__(self, layout: int, state: StateBytes) -> None:
        self._layout = layout
        self._state = state

    def on_get(self, peer: Peer, get: m.Get) -> list[Send]:
        """Answer a request, unless it asks for a part that there is not."""
        if get.part >= self._state.parts:
            return []
        data = self._state.read(get.part)
        state = m.State(self._layout, get.part, self._state.parts, self._state.digest, [data.nbytes])
        return [Send((peer,), state, (data.data,))]


class Joiner:
    """Fetches one layout's state.

    Args:
        layout: Number of the layout.
        state: Where to write it.
        settings: The settings of the job.
        member: (slot, incarnation) of this worker.
        donor: Slot of the worker that has it.
    """

    def __init__(self, layout: int, state: StateBytes, settings: Settings, member: tuple[int, int], donor: int) -> None:
        self._layout = layout
        self._state = state
        self._settings = settings
        self._member = member
        self._donor = donor
        self._missing = set(range(state.parts))
        self._asked: dict[int, float] = {}

    @property
    def complete(self) -> bool:
        """Whether every part has come."""
        return not self._missing

    @property
    def left(self) -> int:
        """How many parts have not come."""
        return len(self._missing)

    def on_state(self, message: m.State, data: Bytes) -> None:
        """Write a part.

        Raises:
            LayoutError: The donor's model has other tensors.
        """
        if message.digest != self._state.digest or message.parts != self._state.parts:
            raise LayoutError(
                f"parameters or buffers of the model differ between workers: digest {message.digest} at worker {self._donor}, "
                f"{self._state.digest} at worker {self._member[0]}; build the same model in every worker"
            )
        if message.part in self._missing:
            self._state.write(message.part, data)
            self._missing.discard(message.part)
            self._asked.pop(message.part, None)

    def tick(self, now: float) -> list[Send]:
        """Ask for the next parts, and again for those that are late."""
        self._asked = {part: at for part, at in self._asked.items() if now - at < ASK_AGAIN_S}
        out = []
        for part in sorted(self._missing - self._asked.keys())[: IN_FLIGHT - len(self._asked)]:
            self._asked[part] = now
            get = m.Get(*self._member, self._donor, self._layout, part)
            # Parts go through all servers in turn, so that no one link carries them all.
            out.append(Send((server_name(part % self._settings.num_shards, self._settings),), get))
        return out
