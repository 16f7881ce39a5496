"""Who has not been heard for some heartbeats: said within seconds, long before anything follows from it.

And whether it was we who did not listen: a process that was stopped, or whose disk has held it up, must not blame the others.
"""

from __future__ import annotations

from collections.abc import Mapping

from .actions import Note

__all__ = ["AWAY_S", "SILENT_BEATS", "Absence", "Silence"]

AWAY_S = 1.0
"""Seconds between two looks at the sockets from which on a process was away. Loops look ten times a second; a record on a slow
disk takes a tenth of this."""

SILENT_BEATS = 5.0
"""Heartbeats without a word before that is said: 2 s by default. A busy machine delays a thread by one of those, not by two."""


class Silence:
    """Tells when somebody falls silent, and when that is over; nothing else depends on it.

    Args:
        heartbeat: How often everybody speaks, in seconds.
    """

    def __init__(self, heartbeat: float) -> None:
        self._limit = SILENT_BEATS * heartbeat
        self._silent: dict[str, float] = {}

    def look(self, heard: Mapping[str, float], now: float) -> list[Note]:
        """Compare with the clock.

        Args:
            heard: When each was heard last, or has been waited for since. Who has left is not in it.
            now: The time, of the same clock.

        Returns:
            `silent` (name, since_s) for each that has been for too long, once; `heard` (name, after_s) for each that was
            and is not any more, because it has spoken or has left.
        """
        notes = []
        for name, since in list(self._silent.items()):
            if heard.get(name) != since:
                del self._silent[name]
                notes.append(Note("heard", {"name": name, "after_s": round(now - since, 3)}))
        for name, since in heard.items():
            if name not in self._silent and now - since > self._limit:
                self._silent[name] = since
                notes.append(Note("silent", {"name": name, "since_s": round(now - since, 3)}))
        return notes


class Absence:
    """Tells how long its owner has not looked: what was not heard in that time is nobody's silence.

    Args:
        now: The time, of the clock that `look` gets.
    """

    def __init__(self, now: float) -> None:
        self._looked = now

    def look(self, now: float) -> float:
        """Return the seconds since the last look if they were too many, else 0."""
        away, self._looked = now - self._looked, now
        return away if away > AWAY_S else 0.0
