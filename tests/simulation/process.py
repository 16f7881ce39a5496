"""What all simulated processes have, and where they may die."""

import json

from ps_accordion.coordinator.loop import LOGGED
from ps_accordion.wire import framing
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Record, Send, Stop
from ps_accordion.worker.member import COORDINATOR

__all__ = ["NAMED", "POINTS", "SHARD_POINTS", "Process"]


SHARD_POINTS = ("s.frozen", "s.view", "s.half", "s.marked")
POINTS = ("w.push", "w.applied", "w.handed_out", "w.admitted", *SHARD_POINTS, "s.sent_some", "c.recorded", "c.sent_some")
"""Named points at which a process may die."""
SENT = {m.View: "c.view_sent_some", m.Welcome: "c.welcomed"}
"""Those behind messages of the coordinator, as its loop has them."""
NAMED = (*POINTS, "s.layout", *LOGGED.values(), *SENT.values())
"""All points, also those that are special cases of another."""


class Process:
    """What all roles have: a name, and a way to send."""

    kind = ""
    has_state = False

    def __init__(self, world, number):
        self.world, self.number = world, number
        self.name = f"{self.kind} {number}"

    def post(self, peer, message, payload=()):
        """Send to a peer: a listener by its link's name, or whoever connected, by the bytes of its name."""
        if isinstance(message, m.Account):
            self.world.tell(self.name, "coordinator 0", message)
            return
        target = peer.decode() if isinstance(peer, bytes) else ("coordinator 0" if peer == COORDINATOR else peer)
        self.world.send(self.name, target, framing.pack(message, payload))

    def carry(self, actions, point=""):
        """Carry actions out; a process may die between any two messages."""
        for action in actions:
            if isinstance(action, Send):
                for peer in action.peers:
                    self.post(peer, action.message, action.payload)
                    if point:
                        self.world.reach(self, SENT.get(type(action.message), ""))
                        self.world.point(self, point, 0.3)
            elif isinstance(action, Record):
                self.log.append(json.loads(json.dumps(action.fields)))
                self.logged(action.fields["what"])
                self.world.reach(self, LOGGED.get(action.fields["what"], ""))
                self.world.point(self, "c.recorded")
            elif isinstance(action, Stop):
                return action
        return None

    def logged(self, what):
        """Note that a record of that kind is on the disk."""

    def heritage(self):
        """Return what whoever is started in its place gets."""
        return {}

    def end(self, error):
        """Note that it has ended by itself."""

    def lost(self, name):
        """Note that a connection broke."""

    def describe(self):
        """Say where it stands, for a hang."""
        return self.name
