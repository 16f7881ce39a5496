"""What the coordinator knows of one run. The machine and its parts share it; a restarted coordinator makes it from the log."""

from __future__ import annotations

from ..config import Settings
from ..wire import messages as m
from ..wire.actions import Peer
from .accounts import Accounts
from .history import History
from .layouts import Layouts, Resume
from .roster import Server, Worker, peers_of
from .views import ShardPlace, Views

__all__ = ["Run"]


class Run:
    """Who is there, which layouts they have, which view they are in.

    Args:
        settings: The settings of the job.
        history: What earlier coordinators of the run have logged. Whoever it names has `timeouts.dead` from now to be heard.
        now: The time.
        resume: The checkpoint that the run goes on from.

    Attributes:
        workers: By slot.
        servers: By number.
        layouts: What was declared, and the plans.
        views: Who takes part in rounds.
        accounts: What they say of their sums.
        left: (slot, incarnation) of who has left the others, and the round of each layout in which it handed over its residual.
        incarnations: The highest that was given out.
        ending: Whether some worker's rounds have ended: from here on views do not change.
        born: When this coordinator began.
    """

    def __init__(self, settings: Settings, history: History, now: float, resume: Resume | None = None) -> None:
        self.settings = settings
        self.resume = resume
        self.layouts = Layouts(settings, history, resume)
        self.views = Views(history)
        self.accounts = Accounts(history.lost, history.accounts, history.settled, found=history.found)
        self.left = dict(history.left)
        self.incarnations = history.incarnations
        self.ending = history.ending
        self.born = now
        self.workers = {
            slot: Worker(
                slot,
                who.incarnation,
                who.token,
                None,
                now,
                restart=who.restart,
                since=now,
                left=(slot, who.incarnation) in history.left,
            )
            for slot, who in history.joined.items()
        }
        self.servers = _servers(self.view, settings, now)

    @property
    def view(self) -> m.View | None:
        """The last view; None before the first."""
        return self.views.view

    @property
    def number(self) -> int:
        """Number of the last view; -1 before the first."""
        return -1 if self.view is None else self.view.p

    def is_in(self, worker: Worker) -> bool:
        """Whether the view names this process."""
        return self.views.members.get(worker.slot) == worker.incarnation

    def was_in(self, worker: Worker) -> bool:
        """Whether a view has named this process, the last one or one before: what was taken out is never let in again."""
        return self.is_in(worker) or self.views.was_removed(worker.slot, worker.incarnation)

    def members(self) -> list[Worker]:
        """Return the processes that the view names, as far as they have not been replaced."""
        return [worker for worker in self.workers.values() if self.is_in(worker)]

    def member(self, slot: int, incarnation: int) -> Worker | None:
        """Return a process that was let in, as long as nobody else has its slot."""
        worker = self.workers.get(slot)
        return worker if worker is not None and worker.incarnation == incarnation else None

    def heard(self) -> dict[str, float]:
        """Return when everybody was heard last that is still waited for, by name."""
        present: list[Worker | Server] = [worker for worker in self.workers.values() if not worker.left]
        return {other.name: other.seen for other in (*present, *self.servers.values())}

    def everybody(self) -> tuple[Peer, ...]:
        """Return where to reach all that can be reached."""
        return peers_of([*self.servers.values(), *self.workers.values()])

    @property
    def first_rounds(self) -> dict[int, int]:
        """The round with which each layout begins that goes on from a checkpoint."""
        return {} if self.resume is None else {layout.number: layout.round for layout in self.resume.manifest.layouts}

    def shards(self) -> list[ShardPlace]:
        """Return number, boot and address of all shards."""
        return [(number, boot, server.address) for _, server in sorted(self.servers.items()) for number, boot in server.shards]


def _servers(view: m.View | None, settings: Settings, now: float) -> dict[int, Server]:
    """Return the servers that hold the shards of a view, not heard yet."""
    servers: dict[int, Server] = {}
    for number, boot, address in view.shards if view is not None else []:
        of = number // settings.servers.shards_per_server
        server = servers.setdefault(of, Server(of, address, (), None, now))
        server.shards = (*server.shards, (number, boot))
    return servers
