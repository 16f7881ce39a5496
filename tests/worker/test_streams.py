"""How streams are waited for, on a device that is not there: a record of calls stands for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ps_accordion.worker import streams
from ps_accordion.worker.streams import Accelerator, Host, streams_of


class Machine:
    """What `torch.cuda` offers, as a log of what was asked of it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = "backward's"
        self.priorities: list[int] = []
        self.default_generators = [Numbers("the model's numbers")]

    def Stream(self, device: torch.device, priority: int = 0) -> Any:
        """Return a stream that can be told to wait."""
        self.priorities.append(priority)
        return Aside(self)

    def current_device(self) -> int:
        """Return the number of the device."""
        return 0

    def Event(self, *, blocking: bool) -> Any:
        """Return an event."""
        assert blocking
        return Event(self)

    def current_stream(self, device: torch.device) -> str:
        """Return where work goes now."""
        return self.now

    def CUDAGraph(self) -> Graph:
        """Return a graph."""
        return Graph(self)

    def graph_pool_handle(self) -> str:
        """Return a new pool of memory."""
        self.log.append("new pool")
        return "pool"

    @contextmanager
    def stream(self, other: Aside) -> Iterator[None]:
        """Let work go elsewhere."""
        before, self.now = self.now, "aside"
        try:
            yield
        finally:
            self.now = before


class Aside:
    """A stream."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def wait_event(self, event: Event) -> None:
        """Note it."""
        self._machine.log.append(f"aside waits for {event.where}")


class Numbers:
    """A generator of random numbers."""

    def __init__(self, state: str) -> None:
        self.state = state

    def graphsafe_get_state(self) -> Numbers:
        """Return a generator of the same state."""
        return Numbers(self.state)

    def graphsafe_set_state(self, other: Numbers) -> None:
        """Take the state of another."""
        self.state = other.state

    def clone_state(self) -> Numbers:
        """Return a generator of a state that is a copy."""
        return Numbers(f"a copy of {self.state}")


class Graph:
    """Recorded work."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def capture_begin(self, *, pool: str, capture_error_mode: str) -> None:
        """Note it."""
        self._machine.log.append(f"records {self._machine.now} in {pool}, {capture_error_mode}")
        self._machine.log.append(f"reserves {self._machine.default_generators[0].state}")

    def capture_end(self) -> None:
        """Note it; fail if what was recorded did."""
        failed = "fails" in self._machine.log
        self._machine.log.append("recorded")
        if failed:
            raise RuntimeError("capture was invalidated")

    def replay(self) -> None:
        """Note it."""
        self._machine.log.append(f"launched {self._machine.now}")


class Event:
    """A mark in a stream."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.where = "nothing"

    def record(self, stream: str) -> None:
        """Note where it stands."""
        self.where = stream

    def synchronize(self) -> None:
        """Note that the host waits."""
        self._machine.log.append(f"host waits for {self.where}")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Put a machine that is not there in the place of `torch.cuda`."""
    standin = Machine()
    monkeypatch.setattr(torch, "cuda", standin)
    return standin


def test_a_mark_stands_in_the_stream_of_the_thread_that_makes_it(machine: Machine) -> None:
    """It is waited for when somebody asks, not before."""
    mark = Accelerator(torch.device("cuda", 0)).mark()
    assert machine.log == []
    mark.synchronize()
    assert machine.log == ["host waits for backward's"]


def test_what_runs_aside_comes_after_the_mark_and_is_waited_for(machine: Machine) -> None:
    """The device orders it behind backward; the host waits for the other stream only."""
    streams = Accelerator(torch.device("cuda", 0))
    with streams.aside(streams.mark()):
        machine.log.append(f"work goes {machine.now}")
    assert machine.log == ["aside waits for backward's", "work goes aside", "host waits for aside"]
    assert machine.now == "backward's"


def test_what_fails_aside_is_waited_for_too(machine: Machine) -> None:
    """The device may still read memory that the failed work would give back."""
    with pytest.raises(ZeroDivisionError), Accelerator(torch.device("cuda", 0)).aside(None):
        raise ZeroDivisionError
    assert machine.log == ["host waits for aside"]


def test_work_is_recorded_aside_and_launched_where_it_is_asked_for(machine: Machine) -> None:
    """Other threads are left alone while it is recorded, and all recordings of one device share a pool of memory."""
    streams, made = Accelerator(torch.device("cuda", 0)), torch.zeros(3)
    for _ in range(2):
        recording = streams.recorded(lambda: machine.log.append(f"work goes {machine.now}") or made)
        assert recording is not None
        assert machine.default_generators[0].state == "the model's numbers"
    begun = ["records aside in pool, thread_local", "reserves a copy of the model's numbers"]
    once = [*begun, "work goes aside", "recorded"]
    assert machine.log == ["new pool", *once, *once]
    assert machine.priorities == [-1]  # those of the other priority are handed out again and again
    machine.log.clear()
    assert recording.launch() is made
    assert machine.log == ["launched backward's"]


def test_a_recording_that_fails_is_ended_and_says_why(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that ending it failed, too. The thread's stream is its own again, torch's allocator is told, no more is recorded."""
    monkeypatch.setattr(streams, "_FAILED", [])

    def told(device: int, pool: str) -> None:
        machine.log.append(f"allocator of device {device} leaves {pool}")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", told, raising=False)

    def work() -> torch.Tensor:
        machine.log.append("fails")
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        Accelerator(torch.device("cuda", 0)).recorded(work)
    assert machine.log[-2:] == ["recorded", "allocator of device 0 leaves pool"]
    assert machine.now == "backward's"
    assert machine.default_generators[0].state == "the model's numbers"
    assert Accelerator(torch.device("cuda", 0)).recorded(lambda: torch.zeros(3)) is None


def test_devices_that_cannot_record_say_so(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is then launched operation by operation."""
    monkeypatch.delattr(Machine, "CUDAGraph")
    assert Accelerator(torch.device("cuda", 0)).recorded(lambda: torch.zeros(3)) is None
    assert Host().recorded(lambda: torch.zeros(3)) is None
    assert machine.log == []


def test_a_stream_can_follow_a_mark(machine: Machine) -> None:
    """The device waits for it there, and the host does not."""
    streams, stream = Accelerator(torch.device("cuda", 0)), Aside(machine)
    mark = streams.mark()
    machine.current_stream = lambda device: stream  # type: ignore[assignment, method-assign, return-value]
    streams.follow(mark)
    assert machine.log == ["aside waits for backward's"]


def test_the_cpu_has_done_everything_at_once() -> None:
    """Its parcels are there as they are, without a copy."""
    streams = streams_of(torch.device("cpu"))
    assert isinstance(streams, Host)
    parcel = torch.arange(5, dtype=torch.uint8)
    memory, mark = streams.fetch(parcel)
    mark.synchronize()
    assert memory.ctypes.data == parcel.data_ptr()
    with streams.aside(streams.mark()):
        pass
