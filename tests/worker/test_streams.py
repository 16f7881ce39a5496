"""How streams are waited for, on a device that is not there: a record of calls stands for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ps_accordion.worker.streams import Accelerator, Host, streams_of


class Machine:
    """What `torch.cuda` offers, as a log of what was asked of it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = "backward's"

    def Stream(self, device: torch.device) -> Any:
        """Return a stream that can be told to wait."""
        return Aside(self)

    def Event(self, *, blocking: bool) -> Any:
        """Return an event."""
        assert blocking
        return Event(self)

    def current_stream(self, device: torch.device) -> str:
        """Return where work goes now."""
        return self.now

    @contextmanager
    def stream(self, other: Aside) -> Iterator[None]:
        """Let work go elsewhere."""
        before, self.now = self.now, "aside"
        yield
        self.now = before


class Aside:
    """A stream."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def wait_event(self, event: Event) -> None:
        """Note it."""
        self._machine.log.append(f"aside waits for {event.where}")


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
