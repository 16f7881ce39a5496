"""A session without servers: the same script as plain training in one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch

from ps_accordion.config import Settings
from ps_accordion.layout import Layout, Tensor
from ps_accordion.selection import lay_out
from ps_accordion.telemetry.events import JsonLines

from .base import BaseSession
from .exchanging import Exchanging
from .memory import Gradient
from .meter import Counters
from .rounds import Decide
from .transfer import StateBytes

__all__ = ["Alone"]


class Alone(BaseSession):
    """The only worker of a run without a coordinator: every mean is this worker's own gradient.

    Gradients go through the same wrapper as in a run with servers, and nothing is compressed or skipped.

    Args:
        settings: Settings of the job; only the run directory counts.
    """

    rank = 0
    world_size = 1
    slot = 0

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings
        self._exchanges: list[Exchanging] = []
        self._counters = Counters()
        directory = settings.run.directory
        self._metrics = JsonLines.of_role(directory, "metrics", "worker", 0) if directory else JsonLines(None)

    @property
    def settings(self) -> Settings:
        """The settings of the job."""
        return self._settings

    @property
    def run_directory(self) -> Path | None:
        """Where this run leaves its records; None where it leaves none."""
        directory = self._settings.run.directory
        return Path(directory) if directory else None

    @property
    def counters(self) -> Counters:
        """What this worker has done so far; it moves nothing."""
        return self._counters

    @property
    def exchanges(self) -> list[Exchanging]:
        """The layouts of this session, by number."""
        return self._exchanges

    def begin_epoch(self, epoch: int) -> None:
        """Do nothing: there is no regime to watch."""

    def log(self, **values: float) -> None:
        """Write numbers to the metrics of the run directory, if there is one."""
        self._metrics.write(round=self._counters.rounds - 1, **{name: float(value) for name, value in values.items()})

    def _say_busy(self, what: str) -> None:
        """Do nothing: nobody waits."""

    def push_pull(self, tensor: torch.Tensor, *, name: str) -> torch.Tensor:
        """Return `tensor` as it is: the mean over one worker."""
        return tensor

    def open_layout(
        self,
        table: list[Tensor],
        *,
        decided: Callable[[Decide], None] | None = None,
        state: StateBytes | None = None,
        device: torch.device | None = None,
    ) -> Exchanging:
        """Return an exchange that gives back what it gets; see `BaseSession.open_layout`."""
        layout = lay_out(table, self._settings, num_shards=1)
        exchange = _Echo(layout, decided, self._counters)
        self._exchanges.append(exchange)
        return exchange

    @property
    def is_donor(self) -> bool:
        """True: there is nobody else."""
        return True

    @property
    def failure(self) -> None:
        """None: no other process can fail."""
        return None

    def on_failure(self, callback: Callable[[BaseException], None]) -> None:
        """Do nothing: no other process can fail."""

    def hand_out(self, exchange: int, blob: bytes) -> None:
        """Do nothing: nobody asks."""

    def fetch(self, exchange: int, donor: int) -> NoReturn:
        """Never called: this worker's own state is always the newest."""
        raise AssertionError("there is no other worker to fetch from")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the session."""
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """End the session. Closing twice is harmless."""
        if not self.closed:
            self.closed = True
            self.training.close()
            self._metrics.close()


class _Echo:
    """One layout without servers: a round is decided as soon as its last gradient is there, and leaves all as it is."""

    takes_tensors = True  # It looks at none.
    leads = True
    batch_multiplier = 1

    def __init__(self, layout: Layout, decided: Callable[[Decide], None] | None, counters: Counters) -> None:
        self.layout = layout
        self.settled: Callable[[], bool] = lambda: True
        self.take: Callable[[], bytes] = lambda: b""
        self.apply: Callable[[bytes], None] = lambda _: None
        self.rate: Callable[[], float] = lambda: math.nan
        self._decided = decided
        self._counters = counters
        self._round = 0
        self._seen: set[int] = set()
        self._used: set[int] = set()

    def add(self, tensor: int, gradient: Gradient, *, used: bool = True) -> None:
        """Take note of a gradient; the last one of the model decides the round."""
        self._seen.add(tensor)
        if used:
            self._used.add(tensor)
        if len(self._seen) < len(self.layout.tensors):
            return
        bits = tuple(
            sum(1 << position for position, part in enumerate(key.slices) if part.tensor in self._used)
            for key in self.layout.keys
        )
        decision = Decide(self._round, "DATA", bits, ())
        self._seen, self._used = set(), set()
        self._round += 1
        self._counters.rounds += 1
        self._counters.dense_bytes += 4 * self.layout.elements
        if self._decided is not None:
            self._decided(decision)

    def wait(self) -> str:
        """Return at once: a round is decided with its last gradient."""
        return "DATA"

    def follow(self, batch_multiplier: int) -> None:
        """Do nothing: there is no leader."""

    def weigh(self, weight: float) -> None:
        """Do nothing: there is nothing to weigh it against."""

    def join(self, *, divide_by_initial_world_size: bool) -> None:
        """Do nothing: there is nobody to wait for."""

    def wait_for_join(self) -> int | None:
        """Return None at once: there is nobody to wait for."""
        return None
