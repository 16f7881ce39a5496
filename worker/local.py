"""Several processes of one host as one worker: they take their mean among themselves, and one of them, the leader, pushes it.

    every process: local mean of a bucket ──> leader: push, wait for the round ──> every process: the leader's result

Within a host that goes through a process group of the script's own, with whatever it is fast with (NCCL, gloo); between hosts it
goes through the servers. To the run this is one worker, whose gradients count as many as there are processes.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch
import torch.distributed as dist

from ps_accordion.config import Settings
from ps_accordion.errors import UsageError
from ps_accordion.layout import Layout, Tensor
from ps_accordion.selection import lay_out

from .base import BaseSession
from .exchanging import Exchanging
from .memory import Gradient
from .meter import Counters
from .rounds import Decide
from .transfer import StateBytes

__all__ = ["Follower", "LocalGroup"]

LETS_GO_S = 1.0
"""How long a tensor may stay with gloo after its collective. It is microseconds."""
MOST_STALLS = 3
"""How often it may stay for longer, until something else counts as keeping tensors, every time."""


class LocalGroup:
    """The processes of one host that act as one worker.

    Args:
        group: Their process group. Its rank 0 leads.

    Attributes:
        size: How many they are.
        rank: Place of this one among them.
        leads: Whether this one pushes.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = group.size()
        self.rank = group.rank()
        self.leads = self.rank == 0
        self._stalls = 0
        nccl = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        self._root = dist.get_global_rank(group, 0)

    def mean(self, buffer: torch.Tensor) -> None:
        """Replace a buffer by its mean over the group."""
        self._reduce(buffer, dist.ReduceOp.SUM)
        buffer.div_(self.size)

    def any(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """Return, flag by flag, whether it is set in any process."""
        bits = torch.tensor(flags, dtype=torch.uint8, device=device)
        self._reduce(bits, dist.ReduceOp.MAX)
        return [bool(bit) for bit in bits.tolist()]

    def tell(self, numbers: Sequence[int]) -> list[int]:
        """Return the leader's numbers in every process; the others only say how many they expect."""
        told = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        self.share([told])
        return [int(number) for number in told.tolist()]

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give all processes what the leader has in these tensors."""
        for tensor in tensors:
            self._lend(tensor, lambda lent: dist.broadcast(lent, src=self._root, group=self.group))

    def _reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType) -> None:
        self._lend(tensor, lambda lent: dist.all_reduce(lent, op=op, group=self.group))

    def _lend(self, tensor: torch.Tensor, collective: Callable[[torch.Tensor], object]) -> None:
        """Carry out a collective, and wait until gloo's thread has let go of the tensor.

        It does so when the collective is over, and takes Python's lock for it. A script may be at its end by then, and a thread
        that asks for the lock of an interpreter that ends takes the process with it, exit code and all. The group may well live
        until then in spite of `destroy_process_group`: the wrapped model holds it.
        """
        lent = tensor.detach()  # which nobody else holds
        held = sys.getrefcount(lent)
        collective(lent)
        if lent.device.type != "cpu" or self._stalls == MOST_STALLS:
            return
        end = time.monotonic() + LETS_GO_S
        # The count in C++ falls first, then Python's, for which the thread needs the lock.
        while lent._use_count() > 1 or sys.getrefcount(lent) > held:  # type: ignore[attr-defined]  # torch has no hint
            if time.monotonic() > end:
                self._stalls += 1
                return
            time.sleep(0)


class Follower(BaseSession):
    """A process whose host has another one that pushes. It knows no servers; its rounds are the leader's.

    Args:
        settings: Settings of the job, as far as this process knows them.
        local: The processes of this host.
    """

    def __init__(self, settings: Settings, local: LocalGroup) -> None:
        super().__init__()
        self.slot = -1
        self.local = local
        self._settings = settings
        self._exchanges: list[Exchanging] = []
        self._counters = Counters()

    @property
    def settings(self) -> Settings:
        """The settings of the job, as far as this process knows them."""
        return self._settings

    @property
    def run_directory(self) -> Path | None:
        """None: the leader keeps the records."""
        return None

    @property
    def counters(self) -> Counters:
        """Zero: the leader moves everything."""
        return self._counters

    @property
    def exchanges(self) -> list[Exchanging]:
        """The layouts of this session, by number."""
        return self._exchanges

    def begin_epoch(self, epoch: int) -> None:
        """Do nothing: the leader marks it."""

    def log(self, **values: float) -> None:
        """Do nothing: the leader's numbers are logged."""

    def _say_busy(self, what: str) -> None:
        """Do nothing: the leader says it."""

    def push_pull(self, tensor: torch.Tensor, *, name: str) -> NoReturn:
        """Refuse; see `Session.push_pull`."""
        raise UsageError(
            f"push_pull({name!r}) does not know local groups: all_reduce in the group, and let its first process call it"
        )

    def open_layout(
        self,
        table: list[Tensor],
        *,
        decided: Callable[[Decide], None] | None = None,
        state: StateBytes | None = None,
        device: torch.device | None = None,
    ) -> Exchanging:
        """Return an exchange that moves nothing; the leader's does."""
        exchange = _Following(lay_out(table, self._settings, num_shards=1))
        self._exchanges.append(exchange)
        return exchange

    @property
    def is_donor(self) -> bool:
        """False: the leader may be one."""
        return False

    @property
    def failure(self) -> None:
        """None: what fails is known by the leader's header."""
        return None

    def on_failure(self, callback: Callable[[BaseException], None]) -> None:
        """Do nothing: what fails is known by the leader's header."""

    def hand_out(self, exchange: int, blob: bytes) -> NoReturn:
        """Never called: there is no join."""
        raise AssertionError("a follower takes no part in a join")

    def fetch(self, exchange: int, donor: int) -> NoReturn:
        """Never called: there is no join."""
        raise AssertionError("a follower takes no part in a join")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the session."""
        self.close(error)

    def leave(self) -> NoReturn:
        """Refuse: see `BaseSession.leave`."""
        raise UsageError("leave() does not know local groups yet: start one process a worker")

    def close(self, error: BaseException | None = None) -> None:
        """End the session. Closing twice is harmless."""
        self.closed = True
        self.training.close()


class _Following:
    """One layout of a follower."""

    takes_tensors = True
    leads = False

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.settled: Callable[[], bool] = lambda: True
        self.take: Callable[[], bytes] = lambda: b""
        self.apply: Callable[[bytes], None] = lambda _: None
        self.rate: Callable[[], float] = lambda: math.nan
        self.batch_multiplier = 1

    def follow(self, batch_multiplier: int) -> None:
        """Take over what the leader says of the next step."""
        self.batch_multiplier = batch_multiplier

    def add(self, tensor: int, gradient: Gradient, *, used: bool = True) -> NoReturn:
        """Never called: the leader pushes."""
        raise AssertionError("a follower pushes nothing")

    def wait(self) -> NoReturn:
        """Never called: the leader's header says what was decided."""
        raise AssertionError("a follower waits for its leader's header")

    def weigh(self, weight: float) -> None:
        """Do nothing: the leader's weight counts."""

    def join(self, *, divide_by_initial_world_size: bool) -> NoReturn:
        """Refuse: see `BaseSession.join`."""
        raise UsageError("join() does not know local groups; give every process of a host the same number of batches")

    def wait_for_join(self) -> NoReturn:
        """Never called: there is no join."""
        raise AssertionError("a follower takes no part in a join")
