"""State of a model, from one worker to others: the one that training starts from, and the one after a join.

Where training starts, that is the memory of all parameters and buffers, which all workers know the size of; after a join it is a
blob that says itself what is in it. Either is cut into parts.
Joiners ask for parts through the servers, some at a time, and again after a while for those that did not come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from ps_accordion.config import Settings
from ps_accordion.errors import LayoutError, WireError
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Peer, Send

from .pushes import server_name

__all__ = ["START", "Blob", "Donor", "Joiner", "StateBytes", "Target"]

PART_BYTES = 1 << 20
IN_FLIGHT = 8
"""Parts asked for at a time: enough to fill a link with 8 MiB in flight, without holding the model in queues."""
ASK_AGAIN_S = 1.0
PATIENCE_S = 3.0
"""Without any part for this long, a joiner asks the next member: the donor may have finished, or be out of reach."""
ASK_FIRST_S = 0.05
"""How soon the first part of a blob is asked for again: the donor may be about to make it."""
MAX_PARTS = 1 << 18
"""Parts of one state: 256 GiB."""

START = -1
"""The state that training starts from, where a state after a join has its round."""

Bytes = NDArray[np.uint8]


class Target(Protocol):
    """Where a joiner writes parts.

    Attributes:
        digest: Of the whole; empty before it is known.
    """

    digest: str

    @property
    def parts(self) -> int:
        """How many parts there are, as far as is known."""

    def learn(self, message: m.State, donor: int, here: int) -> None:
        """Compare what a part says of the whole with what is known of it, or take it over."""

    def write(self, part: int, data: Bytes) -> None:
        """Take a part."""

    def begin_anew(self) -> None:
        """Forget all parts: they come from somebody else from now on."""


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

    def begin_anew(self) -> None:
        """Forget what has been written. Here there is nothing to do: it is written again."""

    def write_back(self) -> None:
        """Bring what was written to where it belongs. Here there is nothing to do: it was written in place."""

    def learn(self, message: m.State, donor: int, here: int) -> None:
        """Raise `LayoutError` if the donor's model has other tensors."""
        if message.digest != self.digest or message.parts != self.parts:
            raise LayoutError(
                f"parameters or buffers of the model differ between workers: digest {message.digest} at worker {donor}, "
                f"{self.digest} at worker {here}; build the same model in every worker"
            )

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


class Blob:
    """Bytes that say themselves what they are.

    Args:
        data: All of them, to hand out; None to receive some.
    """

    def __init__(self, data: bytes | None = None) -> None:
        self._data = np.frombuffer(data or b"", np.uint8)
        self._received: dict[int, Bytes] = {}
        self.digest = "" if data is None else xxhash.xxh3_64_hexdigest(data)
        self.parts = max(1, -(-self._data.nbytes // PART_BYTES))

    def read(self, part: int) -> Bytes:
        """Return one part."""
        return self._data[part * PART_BYTES : (part + 1) * PART_BYTES]

    def learn(self, message: m.State, donor: int, here: int) -> None:
        """Take over how long the blob is. Raises `WireError` if that is impossible, or two parts say different things."""
        if not 0 < message.parts <= MAX_PARTS:
            raise WireError(f"the state of worker {donor} has 1 to {MAX_PARTS} parts, not {message.parts}")
        if not self.digest:
            self.digest, self.parts = message.digest, message.parts
        if (message.digest, message.parts) != (self.digest, self.parts):
            raise WireError(f"parts of the state that worker {donor} sends to worker {here} do not belong together")

    def begin_anew(self) -> None:
        """Forget what has been received: another donor may put the same state into other bytes."""
        self._received, self.digest, self.parts = {}, "", 1

    def write(self, part: int, data: Bytes) -> None:
        """Take a part; it is copied, since what came with a message is freed with it."""
        self._received[part] = data.copy()

    def bytes(self) -> bytes:
        """Return what was received, once all parts are there.

        Raises:
            WireError: They are not what the donor had.
        """
        data = b"".join(self._received[part].tobytes() for part in range(self.parts))
        if xxhash.xxh3_64_hexdigest(data) != self.digest:
            raise WireError(f"a state of {len(data)} bytes came with another digest than it was sent with")
        return data


class Donor:
    """Answers requests for the parts of one layout's state.

    Args:
        layout: Number of the layout.
        round_: Round of the join after which this is the state; -1 for the start.
        state: The state.
    """

    def __init__(self, layout: int, round_: int, state: StateBytes | Blob) -> None:
        self.round = round_
        self._layout = layout
        self._state = state

    def on_get(self, peer: Peer, get: m.Get) -> list[Send]:
        """Answer a request, unless it asks for a state or a part that there is not."""
        if get.round != self.round or get.part >= self._state.parts:
            return []
        data = self._state.read(get.part)
        state = m.State(self._layout, self.round, get.part, self._state.parts, self._state.digest, [data.nbytes])
        return [Send((peer,), state, (data.data,))]


class Joiner:
    """Fetches one layout's state.

    Args:
        layout: Number of the layout.
        round_: Which state: -1 for the start, else the one after the join in that round.
        state: Where to write it.
        settings: The settings of the job.
        member: (slot, incarnation) of this worker.
        donor: Slot of the worker that has it.
        others: Slots that may have it, too.
    """

    def __init__(
        self,
        layout: int,
        round_: int,
        state: Target,
        settings: Settings,
        member: tuple[int, int],
        donor: int,
        others: Sequence[int] = (),
    ) -> None:
        self._layout = layout
        self._round = round_
        self._state = state
        self._settings = settings
        self._member = member
        self.donor = donor
        """Slot of the worker that is asked; a view may name another."""
        self._others = [slot for slot in others if slot not in (donor, member[0])]
        self._moved: float | None = None
        self._missing = set(range(state.parts))
        self._asked: dict[int, float] = {}
        """When each part was asked for that is on its way."""
        self._next = 0
        """The first part that has never been asked for."""

    @property
    def complete(self) -> bool:
        """Whether every part has come."""
        return not self._missing

    @property
    def progress(self) -> tuple[int, ...]:
        """How many parts there are, and how many have not come; an empty tuple once all have."""
        return (self._state.parts, len(self._missing)) if self._missing else ()

    def on_state(self, message: m.State, data: Bytes) -> None:
        """Write a part.

        Raises:
            LayoutError: The donor's model has other tensors.
        """
        if message.round != self._round:
            return  # an answer to an earlier question
        known = self._state.parts
        self._state.learn(message, self.donor, self._member[0])
        self._missing.update(range(known, self._state.parts))
        if message.part in self._missing:
            self._state.write(message.part, data)
            self._missing.discard(message.part)
            self._asked.pop(message.part, None)
            self._moved = None

    def ask(self, donor: int) -> None:
        """Ask another worker from now on; what came of another's state is forgotten."""
        if donor != self.donor:
            self.donor, self._moved, self._asked, self._next = donor, None, {}, 0
            self._state.begin_anew()
            self._missing = set(range(self._state.parts))

    def tick(self, now: float) -> list[Send]:
        """Ask for the next parts, and again for those that are late; somebody else, if nobody answers. Also when one has come."""
        if self._moved is None:
            self._moved = now
        if now - self._moved > PATIENCE_S and self._others and self._missing:
            self._others.append(self.donor)
            self.ask(self._others.pop(0))
        patience = ASK_AGAIN_S if self._state.digest else ASK_FIRST_S
        asks = sorted(part for part, at in self._asked.items() if now - at >= patience)
        room = IN_FLIGHT - len(self._asked)
        while room and self._next < self._state.parts:
            if self._next in self._missing:  # a part may have come before it was asked for
                asks.append(self._next)
                room -= 1
            self._next += 1
        out = []
        for part in asks:
            self._asked[part] = now
            get = m.Get(*self._member, self.donor, self._layout, self._round, part)
            # Parts go through all servers in turn, so that no one link carries them all.
            out.append(Send((server_name(part % self._settings.num_shards, self._settings),), get))
        return out
