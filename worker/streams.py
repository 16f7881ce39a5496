"""Streams of one torch device, and how threads of the host wait for what they carry.

A device does what it is told later, in the order of a *stream*, while the host goes on. The thread of backward only tells it;
codec threads wait, each for what it needs, without the interpreter's lock. The CPU does everything at once: nothing to wait for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch

from ps_accordion.codecs.base import Payload
from ps_accordion.codecs.device import host_memory
from ps_accordion.errors import UsageError

__all__ = ["Accelerator", "Host", "Mark", "Recording", "Streams", "streams_of"]


_RECORDS = threading.Lock()
"""Held while a thread records: one at a time in a process."""
_FAILED: list[Any] = []
"""What could not be recorded. It is kept: torch's allocator may still point there."""


class Mark(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Wait on the host until the device has come here."""


class Recording(Protocol):
    """Work that was recorded."""

    def launch(self) -> torch.Tensor:
        """Launch all of it on the calling thread's stream; return what it makes, in the same memory each time."""


class Streams(Protocol):
    """What a coder asks of a device."""

    def mark(self) -> Mark:
        """Return the present end of the calling thread's stream."""

    def fetch(self, tensor: torch.Tensor) -> tuple[Payload, Mark]:
        """Copy uint8[n] to the host, into memory of its own, on the calling thread's stream: there when the mark is reached."""

    def follow(self, mark: Mark) -> None:
        """Let the device do what is launched on the calling thread's stream from here on after it has come to `mark`."""

    def recorded(self, work: Callable[[], torch.Tensor]) -> Recording | None:
        """Record what `work` launches, which is not done now; None where there is nothing to gain, or no way.

        It must launch the same on the same memory each time, and have run before. All recordings of these streams share memory:
        what one has made is to be copied before another is launched. No other thread should draw random numbers on the device at
        the moment when this begins: it could get an error, or the same numbers again.

        Raises:
            RuntimeError: It does what cannot be recorded. From then on there is no way, in all of this process.
        """

    @contextmanager
    def aside(self, after: Mark | None) -> Iterator[None]:
        """Run what is inside on a stream of its own, behind `after`; leave when the device has done it."""


class _Reached:
    def synchronize(self) -> None:
        """Do not wait: it is done."""


class Host:
    """The CPU, as a device whose tensors lie on the host."""

    def mark(self) -> Mark:
        """See `Streams.mark`."""
        return _Reached()

    def fetch(self, tensor: torch.Tensor) -> tuple[Payload, Mark]:
        """See `Streams.fetch`. Here the memory is the tensor's own: the caller gives it away."""
        return tensor.numpy(), _Reached()

    def follow(self, mark: Mark) -> None:
        """See `Streams.follow`."""

    def recorded(self, work: Callable[[], torch.Tensor]) -> Recording | None:
        """See `Streams.recorded`. To call `work` again costs no more."""
        return None

    @contextmanager
    def aside(self, after: Mark | None) -> Iterator[None]:
        """See `Streams.aside`."""
        yield


class _Graph:
    """A CUDA graph, and the tensor that it makes."""

    def __init__(self, graph: Any, made: torch.Tensor) -> None:
        self._graph, self._made = graph, made

    def launch(self) -> torch.Tensor:
        """See `Recording.launch`."""
        self._graph.replay()
        return self._made


class Accelerator:
    """A device with streams, such as cuda (ROCm too) or xpu.

    Args:
        device: The device.

    Raises:
        UsageError: torch knows no streams for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._torch: Any = getattr(torch, device.type, None)
        if not all(hasattr(self._torch, name) for name in ("Event", "Stream", "current_stream", "stream")):
            raise UsageError(
                f"expected gradients on the CPU or on a device with streams, such as cuda or xpu, got one on {device}; "
                "move the model there"
            )
        self._aside: Any = None
        self._pool: Any = None
        self._recorder: Any = None

    def mark(self) -> Mark:
        """See `Streams.mark`."""
        # Blocking: a thread that waits leaves its core to others.
        event: Any = self._torch.Event(blocking=True) if self._device.type == "cuda" else self._torch.Event()
        event.record(self._torch.current_stream(self._device))
        mark: Mark = event
        return mark

    def fetch(self, tensor: torch.Tensor) -> tuple[Payload, Mark]:
        """See `Streams.fetch`."""
        # torch keeps pinned memory that is given back, and hands it out again only when no copy uses it any more.
        host = host_memory(tensor.numel(), self._device)
        host.copy_(tensor, non_blocking=True)
        return host.numpy(), self.mark()

    def follow(self, mark: Mark) -> None:
        """See `Streams.follow`."""
        self._torch.current_stream(self._device).wait_event(mark)

    def recorded(self, work: Callable[[], torch.Tensor]) -> Recording | None:
        """See `Streams.recorded`."""
        if not hasattr(self._torch, "CUDAGraph") or torch.version.hip:  # ROCm lets no thread ask about events meanwhile
            return None
        with _RECORDS:
            if _FAILED:
                return None
            if self._pool is None:
                # torch hands out the same few streams of a priority again and again: ours of the other priority must not be this
                # one, or what they launch meanwhile would be recorded.
                self._pool, self._recorder = self._torch.graph_pool_handle(), self._torch.Stream(self._device, priority=-1)
            graph = self._torch.CUDAGraph()
            with self._torch.stream(self._recorder):
                try:
                    # What other threads do on streams of theirs meanwhile, such as codec threads, is none of this.
                    with self._numbers_aside():
                        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    made = work()
                    graph.capture_end()
                except BaseException:
                    self._give_up(graph)
                    raise
        return _Graph(graph, made)

    @contextmanager
    def _numbers_aside(self) -> Iterator[None]:
        """Let whoever begins to record inside find a copy of the state of torch's random numbers.

        It is reserved to the recording: nobody else could draw from it until that ends, and, where it fails, ever again.
        """
        numbers = self._torch.default_generators[self._torch.current_device()]
        state = numbers.graphsafe_get_state()
        numbers.graphsafe_set_state(numbers.clone_state())
        try:
            yield
        finally:
            numbers.graphsafe_set_state(state)

    def _give_up(self, graph: Any) -> None:
        """End a recording that has failed, and record no more."""
        _FAILED.append(graph)
        with suppress(RuntimeError):  # it has failed already, and the caller says why
            graph.capture_end()
        # torch stops at that error before it tells its allocator that the recording is over.
        end = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if end is not None:
            with suppress(RuntimeError):
                end(self._torch.current_device(), self._pool)

    @contextmanager
    def aside(self, after: Mark | None) -> Iterator[None]:
        """See `Streams.aside`."""
        if self._aside is None:
            self._aside = self._torch.Stream(self._device)
        with self._torch.stream(self._aside):
            if after is not None:
                self._aside.wait_event(after)
            try:
                yield
            finally:
                # In any case: temporary memory inside must not be handed out again before the device has done with it.
                self.mark().synchronize()


def streams_of(device: torch.device) -> Streams:
    """Return the streams of a device.

    Raises:
        UsageError: torch knows no streams for it.
    """
    return Host() if device.type == "cpu" else Accelerator(device)
