"""Whom the coordinator knows: workers by slot, servers by number."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import Settings
from ..wire import messages as m
from ..wire.actions import Peer, Send

__all__ = ["Server", "Worker", "disagreement", "forgotten", "peers_of", "refused"]


@dataclass
class Worker:
    """A worker that was let in."""

    slot: int
    incarnation: int
    token: str
    peer: Peer | None
    """Where to answer it; None until it has been heard, by a coordinator that knows it from its log."""
    seen: float
    plans: dict[int, int] = field(default_factory=dict)
    """Version of the plan in force there, by layout."""
    busy: str = ""
    """What it does instead of training, in its own words."""
    left: bool = False
    """Whether it has said goodbye: all its rounds have ended, or the others go on without it."""
    restart: int = 0
    """How often whoever started it has started it again."""
    synced: bool = True
    """Whether it can hand out the state after the last round."""
    ready: bool = False
    """Whether it wants to be in the next view, and is in none."""
    rounds: dict[int, int] = field(default_factory=dict)
    """The open round of each layout."""
    waits: Collection[int] = ()
    """Layouts whose open round it has pushed all of, and waits for; none where it computes."""
    since: float = 0.0
    """When that, or a round, changed last."""
    lost: float = math.inf
    """When its connection broke; infinite while it has one."""
    cut: dict[int, float] = field(default_factory=dict)
    """Servers that live and that it has no connection to, and since when."""
    asked: float = math.inf
    """Since when it owes a promise, because a shard has lost its memory; infinite while it owes none."""
    gone: str = ""
    """Why it is taken for dead; empty while it is not."""

    @property
    def name(self) -> str:
        """How people call it."""
        return f"worker {self.slot}"


@dataclass
class Server:
    """A server process and the shards in it."""

    number: int
    address: str
    shards: tuple[tuple[int, int], ...]
    peer: Peer | None
    """Where to answer it; None until it has been heard, by a coordinator that knows it from its log."""
    seen: float
    layouts: dict[int, str] = field(default_factory=dict)
    """Digest of each layout that it holds."""
    lost: float = math.inf
    """When its connection broke; infinite while it has one."""
    gone: str = ""
    """Why it is taken for dead; empty while it is not. A new process with the same memory takes its place."""

    @property
    def name(self) -> str:
        """How people call it."""
        return f"server {self.number}"


def peers_of(others: Iterable[Worker | Server]) -> tuple[Peer, ...]:
    """Return where to reach those that have been heard; the others hear when they are."""
    return tuple(other.peer for other in others if other.peer is not None)


def disagreement(terms: Mapping[str, Any], settings: Settings, who: str) -> str:
    """Say in which term a joiner and this job differ; empty if they agree."""
    if not terms:
        return ""
    ours = settings.terms()
    for name, value in terms.items():
        if name not in ours:
            return f"{who} knows a setting {name!r} that this coordinator does not; install the same release everywhere"
        if ours[name] != value:
            return (
                f"{name} is {value!r} at {who} and {ours[name]!r} in this job (the coordinator's settings); "
                "give both the same value (the same config file does), or leave it out at a worker"
            )
    return ""


def forgotten(who: str, view: int) -> str:
    """Say what it means that a process is in a later view than any that the coordinator knows."""
    return (
        f"{who} is in view {view} of a run that this coordinator does not know: the one before it has left no log; "
        "name a run directory (run.directory), and start the run anew"
    )


def refused(token: str, peer: Peer, reason: str) -> Send:
    """Return the answer to a process that has no place in the run."""
    return Send((peer,), m.Refused(token, reason[: m.MAX_TEXT]))
