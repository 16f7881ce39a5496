"""Whom the coordinator knows: workers by slot, servers by number, layouts by number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import Settings
from ..layout import Layout
from ..wire.actions import Peer
from .planning import Planner

__all__ = ["LayoutEntry", "Server", "Worker", "disagreement"]


@dataclass
class Worker:
    """A worker that was let in."""

    slot: int
    incarnation: int
    token: str
    peer: Peer
    seen: float
    plans: dict[int, int] = field(default_factory=dict)
    """Version of the plan in force there, by layout."""
    busy: str = ""
    """What it does instead of training, in its own words."""
    left: bool = False

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
    peer: Peer
    seen: float
    layouts: dict[int, str] = field(default_factory=dict)
    """Digest of each layout that it holds."""

    @property
    def name(self) -> str:
        """How people call it."""
        return f"server {self.number}"


@dataclass
class LayoutEntry:
    """A layout that some worker declared."""

    number: int
    layout: Layout
    planner: Planner
    declared: dict[int, Peer] = field(default_factory=dict)
    """Slots whose declaration agreed."""

    def held_by(self, server: Server) -> bool:
        """Whether `server` has said that it holds this layout."""
        return server.layouts.get(self.number) == self.layout.digest


def disagreement(terms: Mapping[str, Any], settings: Settings, who: str) -> str:
    """Say in which term a joiner and this job differ; empty if they agree."""
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
