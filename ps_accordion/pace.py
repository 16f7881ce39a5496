"""How often a thread that does one task after another tells the next one of what it has done."""

from __future__ import annotations

__all__ = ["Pace"]


class Pace:
    """Says after which tasks to hand on: the first at once, and then twice as many each time, up to `most`.

    Whoever waits for the outcome begins early, and while there is much to do, it is woken rarely and finds much. Nothing is kept
    back while the thread waits itself.

    Args:
        most: Tasks after which it hands on at the latest.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._done, self._next = 0, 1

    def hand_on(self, *, idle: bool) -> bool:
        """Note that a task is done; return whether to hand on what is ready.

        Args:
            idle: Whether there is no further task at this moment.
        """
        self._done += 1
        if not idle and self._done < self._next:
            return False
        self._done, self._next = 0, 1 if idle else min(2 * self._next, self._most)
        return True
