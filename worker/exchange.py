"""One layout's gradients, round by round: they come in as backward makes them, and the aggregate goes back in their place.

The thread that computes gradients calls `add`; codec threads encode and decode; the thread that owns the sockets keeps the
rounds. Each hands on by queue, so nothing here takes a lock.

How a gradient becomes a push, and a result an aggregate, depends on where gradients lie: `host_exchange.py` and
`device_exchange.py` say that. What is here is the same for both.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from typing_extensions import Buffer

from ps_accordion.codecs.base import FloatVector, Payload
from ps_accordion.codecs.cache import meet
from ps_accordion.errors import RunAborted, TooManySkips, UsageError, WireError
from ps_accordion.layout import Key, Layout, Slice
from ps_accordion.telemetry import trace
from ps_accordion.wire import messages as m
from ps_accordion.wire.lane import Loan

from .account import Account
from .coder import Pushed
from .following import KeyCodecs
from .memory import Gradient
from .pushes import server_name
from .rounds import Decide, Decode, Rounds, Standing

if TYPE_CHECKING:
    from .client import Client

__all__ = ["Coder", "Exchange", "Open", "Timing"]


@dataclass
class Timing:
    """Where the time of a round went, in seconds; `encode` and `decode` are summed over the threads.

    Of what a device encodes, `encode` has only the time that the host takes to launch it.
    """

    last_gradient: float = 0.0
    encode: float = 0.0
    decode: float = 0.0


@dataclass
class Open:
    """The round that is being filled: a gradient a tensor, and how many of a key's slices are still to come."""

    waiting: list[int]
    weight: float
    gradients: dict[int, Any] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    out: bool = False
    """Whether this worker was out of the run when it began: nothing is encoded, and the step is lost."""

    def part_of(self, key: Key) -> tuple[int, float]:
        """Return which of a key's slices have a gradient, as bits, and what they count for in the mean."""
        used = sum(1 << position for position, part in enumerate(key.slices) if part.tensor in self.used)
        if key.buffer:  # one worker's values for all: whoever leads
            return used, 1.0 if used else 0.0
        return used, self.weight


class Coder(Protocol):
    """What every coder of a key has, wherever the gradients lie."""

    key: Key
    incarnation: int
    """Of this worker, in the headers of its pushes."""
    bound: int
    """Bytes of the last push's bound, 0 before the first: a larger one means that compression has turned lighter."""

    @property
    def account(self) -> Account:
        """What this key's pushes and results come to so far."""

    @property
    def codecs(self) -> KeyCodecs:
        """The codecs of this key, on the host."""

    def host_residual(self) -> FloatVector | None:
        """Return a copy of the residual, float32[key.elements], or None if there is none."""

    def set_residual(self, residual: FloatVector) -> None:
        """Take over a residual, float32[key.elements]; it is copied."""

    @property
    def moves(self) -> bool:
        """Whether some slice is given momentum before it is encoded."""

    def host_velocity(self) -> FloatVector | None:
        """Return a copy of the momentum that was built up before encoding, float32[key.elements], or None if there is none."""

    def set_velocity(self, velocity: FloatVector) -> None:
        """Take over such a momentum, float32[key.elements]; it is copied. Of keys that have it."""

    def without_payload(self, kind: m.PushKind, *, round_: int, previous_skipped: bool, weight: float = 1.0) -> m.Push:
        """Return a push of kind UNUSED, SKIP, JOINED or EMPTY."""

    def flush(self, *, round_: int, previous_skipped: bool, weight: float) -> Pushed:
        """Return a push of kind FLUSH with all of the residual, which is zero then."""


class Exchange(ABC):
    """The rounds of one layout at this worker, with everything that they move.

    Args:
        client: Sockets and threads of this worker.
        number: Number of the layout.
        layout: The layout.
        decided: Called, on the socket's thread, when a round is decided and its aggregate stands in the gradients' memory.
    """

    takes_tensors: ClassVar[bool]
    """Whether gradients come as torch tensors, or as arrays of the host."""

    def __init__(self, client: Client, number: int, layout: Layout, decided: Callable[[Decide, Timing], None]) -> None:
        self.client = client
        self.number = number
        self.layout = layout
        self.rounds = Rounds(number, layout, client.settings)
        self.behind = False
        """Whether this worker has to take over where the others stand before it can take part in a round."""
        self.current = True
        """Whether this worker has applied every round so far."""
        self.starting = False
        """Whether it has yet to fetch the parameters that training starts from."""
        self.whole = True
        """Whether this worker has seen the result of every round."""
        self.flushed: int | None = None
        """The round in which this worker has handed its residual over to the run; None before."""
        self._decodes = 0
        self._decided = decided
        self._keys_of: dict[int, list[tuple[Key, Slice]]] = {index: [] for index in range(len(layout.tensors))}
        meet(sum(key.elements for key in layout.keys))
        for key in layout.keys:
            for part in key.slices:
                self._keys_of[part.tensor].append((key, part))
        self.weight = 1.0
        """What this worker's gradients count for in the mean, from the next round on."""
        self._open: Open | None = None
        self._timing = Timing()
        self._idle_weight = 0.0

    # ------------------------------------------------------------ where gradients lie

    @property
    @abstractmethod
    def coders(self) -> Sequence[Coder]:
        """The coders, by key."""

    @abstractmethod
    def _begin(self, key: Key, current: Open) -> None:
        """Turn a key's gradient into a push; on backward's thread, when the last slice is there. Ends with `_on_pushed`."""

    @abstractmethod
    def _decode(self, key: Key, decode: Decode, current: Open) -> None:
        """Validate a key's aggregate, and write it into the gradients' memory, on the codec thread that owns the key."""

    @abstractmethod
    def _take_back(self, push: m.Push, payload: Payload) -> None:
        """Return a payload to the residual, on the socket's thread, before a round is reported as decided."""

    @abstractmethod
    def residuals(self) -> Iterable[tuple[int, FloatVector | None]]:
        """Return each key's number and residual, for records, once the codec threads have ended."""

    # ------------------------------------------------------------ the thread that computes gradients

    def add(self, tensor: int, gradient: Gradient, *, used: bool = True) -> None:
        """Hand over the gradient of one tensor for this round; the first call of a round begins it.

        Args:
            tensor: Index in the layout.
            gradient: [elements], contiguous and flat. It is read until the round is decided and then holds the aggregate: the
                caller leaves it alone until `decided` is called.
            used: Whether this worker has a gradient for it (for buffers: whether its values are the ones for all);
                if not, `gradient` only says where the aggregate goes.

        Raises:
            UsageError: The tensor has been handed over in this round already.
        """
        now = time.perf_counter()
        if self._open is None:
            self._open = Open([len(key.slices) for key in self.layout.keys], self.weight, out=self.rounds.out or self.behind)
            self._timing = Timing()
        current = self._open
        if tensor in current.gradients:
            raise UsageError(f"tensor {self.layout.tensors[tensor].name!r} already has a gradient in round {self.rounds.round}")
        current.gradients[tensor] = gradient
        if used:
            current.used.add(tensor)
        self._timing.last_gradient = now
        if current.out:
            if len(current.gradients) == len(self.layout.tensors):
                self.client.call(self._step_over)
            return
        for key, _ in self._keys_of[tensor]:
            current.waiting[key.number] -= 1
            if not current.waiting[key.number]:
                self._begin(key, current)

    # ------------------------------------------------------------ codec threads

    def _decoding(self, key: Key, decode: Decode, current: Open) -> Callable[[], None]:
        def work() -> None:
            began = trace.now()
            try:
                if stands := decode.verified():
                    self._decode(key, decode, current)
            except WireError as error:
                raise WireError(f"from {server_name(key.shard, self.client.settings)!r}: {error}") from None
            if stands:
                self._account_for(decode)
                stands = decode.stands
            seconds = (trace.now() - began) / 1e9
            self._trace("decode", began, decode.result)
            self.client.call_soon(lambda: self._on_decoded(decode, seconds, stands=stands))

        return work

    def _trace(self, name: str, began: int, message: m.Push | m.Result) -> None:
        self.client.trace.span(name, began, layout=message.layout, key=message.key, round=message.round)

    # ------------------------------------------------------------ the thread that owns the sockets

    def _on_pushed(self, pushed: Pushed, seconds: float) -> None:
        self._timing.encode += seconds
        if pushed.loss:
            self.client.events.write(
                event="loss",
                layout=self.number,
                key=pushed.message.key,
                round=pushed.message.round,
                norm=pushed.loss,
                why="switch",
            )
        self._push(pushed.message, pushed.payload)
        if self.rounds.out:
            self._try_decide()

    def _push(self, push: m.Push, payload: Payload | None) -> None:
        self.client.record.push(push, payload)
        self.client.carry(self.rounds.pushed(push, payload, time.monotonic()))

    def on_result(self, result: m.Result, frames: Sequence[Buffer], loan: Loan | None = None) -> None:
        """Take in a result, with what tells whether frames that were lent still hold it."""
        now = time.monotonic()
        decode = self.rounds.on_result(result, frames, now, loan)
        self.client.carry(self.rounds.released(now))
        if decode is None:
            self._try_decide()
            return
        self.client.record.result(decode.result, decode.payload)
        if self._open is None:  # idle: nobody wants the aggregate
            if decode.verified():
                decode.codec.validate(decode.payload, decode.coding)
                self._account_for(decode)
            self.rounds.decoded(decode, stands=decode.stands)
            self._try_decide()
            return
        self._decodes += 1
        key = self.layout.keys[decode.key]
        self.client.codecs.submit(decode.key, self._decoding(key, decode, self._open))

    def _account_for(self, decode: Decode) -> None:
        """Note what a result comes to, which counts when the round does."""
        if not self.layout.keys[decode.key].buffer:
            coder = self.coders[decode.key]
            coder.account.result(decode.codec, decode.payload, decode.coding)
            coder.codecs.result(decode.payload, decode.coding)

    def _on_decoded(self, decode: Decode, seconds: float, *, stands: bool) -> None:
        self._decodes -= 1
        self._timing.decode += seconds
        self.rounds.decoded(decode, stands=stands)
        self._try_decide()

    def _try_decide(self) -> None:
        if self.rounds.out and self._decodes:
            return  # what is still being written belongs to a round that is lost to us: not into the gradients of the next
        round_ = self.rounds.round
        try:
            decision = self.rounds.decide()
        except TooManySkips:
            self._note_skip(round_)
            raise
        if decision is None:
            return
        for push, payload in decision.take_back:
            self._take_back(push, payload)
        if decision.kind == "SKIP":
            self._note_skip(round_)
        self._end(decision)

    @property
    def has_state(self) -> bool:
        """Whether this worker can hand out the state after the last round; it can when it has finished, until others go on."""
        return self.current and not (self.behind or self.starting)

    def _end(self, decision: Decide) -> None:
        if self._open is None and decision.kind == "DATA" and any(decision.used):
            self.current = False  # it looks on, and does not apply what others do
        elif decision.kind == "JOIN":
            self.current = True  # it takes over the state that it lacks before it goes on
        self._open = None
        for coder in self.coders:
            # A result that a view took back may have become none: in the round that counts, nobody used the key.
            counted = decision.kind == "DATA"
            applied = counted and decision.used[coder.key.number] > 0
            coder.account.decided(counted=counted, applied=applied, out=decision.out)
            coder.codecs.decided(applied=applied)
        if decision.kind == "JOIN" and self.rounds.idle == "JOINED":
            self.rounds.idle = None
        if self.rounds.idle == "FLUSH" and decision.out:
            self.rounds.idle = None  # whether that has counted is known when this worker is in again
        elif self.rounds.idle == "FLUSH" and decision.kind != "SKIP":  # else it is in the residual again, and goes once more
            self.rounds.idle, self.flushed = "EMPTY", decision.round
        self._decided(decision, self._timing)
        if self.rounds.idle is not None and not self.rounds.ended:
            self._push_idle()

    def _step_over(self) -> None:
        """End a round that began when this worker was out already."""
        self._end(Decide(self.rounds.round, "SKIP", (0,) * len(self.layout.keys), (), None, out=True))

    # ------------------------------------------------------------ views

    def on_view(self, view: m.View, now: float, *, member: bool) -> None:
        """Obey a view.

        Args:
            view: Newer than the last one.
            now: The time.
            member: Whether it names this worker.

        Raises:
            RunAborted: It does not, while this worker waits in `join`.
        """
        was_out = self.rounds.out
        self.rounds.on_view(view, now, member=member)
        if member:
            self._try_decide()  # all results may have been there, and a promise in the way
        if member or was_out:
            return
        self.behind = True
        if self.rounds.idle == "JOINED":
            raise RunAborted("this worker was taken out of the run while it waited in join(), and cannot come back into that")
        if self.flushed is not None:
            self.rounds.idle = self.flushed = None  # it had not left yet, and does so anew if it comes in again
        if self.rounds.idle == "EMPTY":
            self.rounds.ended = self.rounds.alone = True  # it had finished: there is nothing that it would come back for
        else:
            self._try_decide()

    @property
    def standing(self) -> Standing:
        """Where the rounds stand, for whoever joins in the middle or takes the run up later."""
        starts = (coder.codecs.start for coder in self.coders)
        return replace(self.rounds.standing, starts=tuple(start for start in starts if start is not None))

    def admit(self, standing: Standing, incarnation: int, *, missed: bool = True) -> None:
        """Go on where the others stand; see `Rounds.admit`.

        Args:
            standing: Where that is.
            incarnation: Of this worker now.
            missed: Whether this run has had rounds before, whose results this worker may not have seen.
        """
        last = self.rounds.round - 1
        for push, payload in self.rounds.admit(standing, incarnation):
            self._take_back(push, payload)
        if self.rounds.uncounted:
            self.rounds.uncounted = False
            norm = math.hypot(*(coder.account.uncounted() for coder in self.coders if not coder.key.buffer))
            self.client.events.write(event="loss", layout=self.number, round=last, norm=norm, why="made again")
        starts = {(start.tensor, start.start): start for start in standing.starts}
        for coder in self.coders:
            coder.incarnation = incarnation
            part = coder.key.slices[0]
            if (start := starts.get((part.tensor, part.start))) is not None:
                coder.codecs.go_on(start)
        self.behind, self.current, self.whole = False, True, self.whole and not missed

    def _note_skip(self, round_: int) -> None:
        self.client.events.write(event="skip", layout=self.number, round=round_)

    @property
    def is_open(self) -> bool:
        """Whether some gradient of a round has been handed over, and the round is not decided."""
        return self._open is not None

    @property
    def stands(self) -> bool:
        """Whether the state after the last round stays as it is: a round is open, or this worker makes no step in it."""
        return self.is_open or self.rounds.idle in ("FLUSH", "EMPTY")

    def finish(self) -> None:
        """Say in every round from now on that this worker has no more gradients, until all have finished."""
        if self.rounds.idle != "EMPTY":
            self.rounds.idle = "EMPTY"
            self._push_idle()

    def flush(self) -> None:
        """Hand over all residuals in the next round that counts, and nothing after it: this worker is about to leave.

        That has happened when `flushed` says so. If the worker is taken out of the run first, it may come in and do it again.
        """
        if self.rounds.idle is None and not self.behind:
            self.rounds.idle, self.rounds.leaving, self.whole = "FLUSH", True, False
            self._push_idle()

    def join(self, weight: float) -> None:
        """Say in every round from now on that this worker waits, until all do or have finished: a round decided as JOIN.

        Args:
            weight: What its missing gradients count for in the mean.
        """
        self._idle_weight = weight
        self.rounds.idle = "JOINED"
        self._push_idle()

    def _push_idle(self) -> None:
        rounds = self.rounds
        assert rounds.idle is not None
        for coder in self.coders:
            if rounds.idle == "FLUSH":
                # Behind what a skipped round returns to the residual.
                self.client.codecs.submit(coder.key.number, self._flushing(coder))
                continue
            # Buffers are not a mean: who has none must not count.
            weight = 0.0 if coder.key.buffer or rounds.idle == "EMPTY" else self._idle_weight
            push = coder.without_payload(
                rounds.idle, round_=rounds.round, previous_skipped=rounds.previous_skipped, weight=weight
            )
            self._push(push, None)

    def _flushing(self, coder: Coder) -> Callable[[], None]:
        round_, skipped = self.rounds.round, self.rounds.previous_skipped
        weight = 0.0 if coder.key.buffer else self.weight

        def work() -> None:
            pushed = coder.flush(round_=round_, previous_skipped=skipped, weight=weight)
            self.client.call_soon(lambda: self._on_pushed(pushed, 0.0))

        return work
