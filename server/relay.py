"""Passes the state of a model from the worker that has it to those that do not.

Workers are not reachable for each other; every server is. A joiner asks a server for a part, the server asks the donor once,
however many joiners ask, and hands the answer to all of them. Nothing is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import Buffer

from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Action, Peer, Send

__all__ = ["Relay"]


class Relay:
    """Routes of the members, and who waits for which part."""

    def __init__(self) -> None:
        self._routes: dict[int, Peer] = {}
        self._incarnations: dict[int, int] = {}
        self._waiting: dict[tuple[int, int, int], dict[Peer, None]] = {}  # in order of asking, which replays; a set's does not

    def hello(self, peer: Peer, hello: m.Hello) -> list[Action]:
        """Remember whose connection this is, and echo the greeting."""
        if hello.incarnation >= self._incarnations.get(hello.slot, 0):  # a greeting of the process before may come late
            self._routes[hello.slot], self._incarnations[hello.slot] = peer, hello.incarnation
        return [Send((peer,), hello)]

    def heard(self, peer: Peer, slot: int) -> None:
        """Note whose connection this is where nobody has said: the process that was greeted has been started again."""
        self._routes.setdefault(slot, peer)

    def name_of(self, peer: Peer) -> str:
        """Return what people call the member behind a connection; empty where nobody has said."""
        return next((f"worker {slot}" for slot, route in self._routes.items() if route == peer), "")

    def get(self, peer: Peer, get: m.Get) -> list[Action]:
        """Pass a request on to the donor, unless it has been asked for this part.

        The joiner repeats it, so a loss costs only time.
        """
        # Who asks for a later state has the earlier one: what is still noted for that came too late, and would stay for ever.
        for known in [known for known in self._waiting if known[0] == get.layout and known[1] < get.round]:
            del self._waiting[known]
        waiting = self._waiting.setdefault((get.layout, get.round, get.part), {})
        asked = bool(waiting) and peer not in waiting
        waiting[peer] = None
        donor = self._routes.get(get.donor)
        return [] if donor is None or asked else [Send((donor,), get)]

    def state(self, state: m.State, payload: Sequence[Buffer]) -> list[Action]:
        """Hand a part to all who asked for it."""
        waiting = self._waiting.pop((state.layout, state.round, state.part), None)
        return [Send(tuple(waiting), state, tuple(payload))] if waiting else []
