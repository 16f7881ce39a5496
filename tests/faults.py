"""Loses, doubles and reorders messages at the seam between a process and its sockets, by seed."""

import random

from ps_accordion.wire.transport import Transport

__all__ = ["Faults", "faulty"]


class Faults:
    """Stands in for `Transport(outgoing=...)`.

    A message that is held back goes out behind the next one; nothing else of ours delays messages, so this reorders them.
    """

    def __init__(self, seed, *, drop, double, reorder):
        self._random = random.Random(seed)
        self._drop, self._double, self._reorder = drop, double, reorder
        self._held = []
        self.counts = dict.fromkeys(("passed", "dropped", "doubled", "reordered"), 0)

    def __call__(self, peer, frames):
        """Return what is sent in place of this message."""
        # Held messages outlive the call, so they must not share memory with what the process reuses.
        copy = [bytes(memoryview(frame)) for frame in frames]
        out = []
        if self._random.random() < self._drop:
            self.counts["dropped"] += 1
        elif self._random.random() < self._reorder:
            self.counts["reordered"] += 1
            self._held.append((peer, copy))
            return []
        else:
            self.counts["passed"] += 1
            out.append((peer, copy))
            if self._random.random() < self._double:
                self.counts["doubled"] += 1
                out.append((peer, copy))
        held, self._held = self._held, []
        return out + held


def faulty(seed, faults, **rates):
    """Return a factory of sockets with faults, and keep each role's `Faults` in `faults`."""

    def transport(name):
        faults[name] = Faults(f"{seed} {name}", **rates)
        return Transport(outgoing=faults[name])

    return transport
