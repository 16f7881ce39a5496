"""The progress line: what the run is doing now, read from the metrics that worker 0 writes.

    step 412 · loss 0.0931 · accuracy 97.8 % · 21.4 ms a step · 31.0 KB a step · 38.7x fewer bytes · 17 % of tensors critical
    step 413 · worker 1: evaluation · loss 0.0929 · ...
    step 413 · waiting for worker 1 (workers.minimum is 3), 12 s · workers 2/3 (1: left) · loss 0.0929 · ...
    step 414 · workers 3/4 (2: restarting in 1.6 s, 3 of 3) · servers 1/2 (0: silent for 4 s) · loss 0.0928 · ...

Who is not as it should be stands in front; that all are, at the end.

Bytes a step are what worker 0 pushed and pulled, headers included; the factor is against dense float32 both ways.
What a worker does instead of training, while the others wait for it, stands in the coordinator's events.
"""

from __future__ import annotations

import collections
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Progress", "Tail", "human_bytes"]

RECENT = 20
"""Rounds that the figures are taken over: enough to be steady, few enough to show a change of regime at once."""


NAMED = 3
"""Workers that are busy with the same thing, or processes of a role that have something the matter, and are named; of more it
says how many."""


class Tail:
    """Read the JSON objects that are appended to a file, each once."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """Return the objects on the lines that were completed since the last call."""
        try:
            with self._file.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:  # nobody has written yet
            return []
        end = data.rfind(b"\n") + 1  # the last line may be half written
        self._offset += end
        return [json.loads(line) for line in data[:end].splitlines() if line.strip()]


class Progress:
    """The progress line of one run.

    Args:
        metrics: The file that worker 0 appends its metrics to; it need not exist yet.
        events: The file that the coordinator appends its events to; nor need this.
        worker: The file that worker 0 appends its events to: whether the coordinator is silent. It need not exist, either.
        clock: Gives the time, in seconds.
    """

    def __init__(self, metrics: Path, events: Path, worker: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tail = Tail(metrics)
        self._events = Tail(events)
        self._seen_by_worker = Tail(worker)
        self._clock = clock
        self._busy: dict[int, str] = {}
        self._waiting: tuple[str, float] | None = None
        """For whom the rounds stand still, and since when."""
        self._left: set[str] = set()
        """Workers that have left the others."""
        self._silent: dict[str, float] = {}
        """Since when the coordinator has not heard whom."""
        self._recent: collections.deque[dict[str, Any]] = collections.deque(maxlen=RECENT)
        self._latest: dict[str, float] = {}
        self._layout: int | None = None

    def update(self, states: Mapping[str, str]) -> str | None:
        """Read what is new; return the line to show, or None when there is nothing new to say.

        Args:
            states: What is the matter with each process, as whoever started it sees it; empty where nothing is.
        """
        fresh = self._read_events()
        for row in self._tail.read():
            if self._layout is None:
                self._layout = row.get("layout", 0)
            if row.get("layout", 0) != self._layout:  # other tensors' rounds are not steps of the model
                continue
            fresh = True
            self._recent.append(row)
            self._latest.update({name: row[name] for name in ("loss", "accuracy") if row.get(name) is not None})
        troubles = {name: said for name, state in states.items() if (said := state or self._trouble(name))}
        return self._line(states, troubles) if fresh or self._busy or self._waiting or troubles else None

    def _trouble(self, name: str) -> str:
        if name in self._left:
            return "left"
        since = self._silent.get(name)
        return "" if since is None else f"silent for {self._clock() - since:.0f} s"

    def _read_events(self) -> bool:
        """Take note of who is busy, and who silent, and for whom all wait; return whether that has changed."""
        before = self._busy.copy(), self._silent.copy(), self._left.copy(), self._waiting
        for event in self._events.read():
            if event["event"] == "busy":
                # Any text may stand there, and this is one line.
                what = "".join(letter if letter.isprintable() else " " for letter in event["what"])
                self._busy.pop(event["slot"], None)
                if event["what"]:
                    self._busy[event["slot"]] = what
            else:
                self._note_silence(event)
                self._note_members(event)
        for event in self._seen_by_worker.read():
            if event.get("name") == "coordinator":
                self._note_silence(event)
        return (self._busy, self._silent, self._left, self._waiting) != before

    def _note_members(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "waiting":
            self._waiting = event["missing"], self._clock() - event["since_s"]
        elif event["event"] in ("resumed", "view"):
            self._waiting = None
            self._left -= {f"worker {slot}" for slot in event.get("new", ())}
        elif event["event"] == "leave" and event.get("early"):
            self._left.add(f"worker {event['slot']}")

    def _note_silence(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "silent":
            self._silent[event["name"]] = self._clock() - event["since_s"]
        elif event["event"] == "heard":
            self._silent.pop(event["name"], None)

    def _line(self, states: Mapping[str, str], troubles: Mapping[str, str]) -> str | None:
        busy: dict[str, list[int]] = {}
        for slot, what in sorted(self._busy.items()):
            busy.setdefault(what, []).append(slot)
        waiting = [f"{_workers(slots)}: {what}" for what, slots in busy.items()]
        if self._waiting is not None:
            missing, since = self._waiting
            waiting.insert(0, f"waiting for {missing}, {self._clock() - since:.0f} s")
        wrong, whole = _roles(states, troubles)
        if not self._recent:
            return " · ".join([*wrong, *waiting]) or None
        last = self._recent[-1]
        # Near the front, because a terminal cuts off the end.
        parts = [f"step {last['round']}", *waiting, *wrong] if self._waiting else [f"step {last['round']}", *wrong, *waiting]
        if "loss" in self._latest:
            parts.append(f"loss {self._latest['loss']:.4f}")
        if "accuracy" in self._latest:
            parts.append(f"accuracy {100 * self._latest['accuracy']:.1f} %")
        parts.append(f"{1000 * statistics.median(row['step_s'] for row in self._recent):.1f} ms a step")
        moved = sum(row["push_bytes"] + row["pull_bytes"] for row in self._recent)
        parts.append(f"{human_bytes(moved / len(self._recent))} a step")
        if moved:
            parts.append(f"{2 * sum(row['dense_bytes'] for row in self._recent) / moved:.1f}x fewer bytes")
        parts.append(f"{100 * last['critical_share']:.0f} % of tensors critical")
        return " · ".join([*parts, *whole])


def _roles(states: Mapping[str, str], troubles: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Say how many of each role there are: of those with somebody missing, and of the others."""
    roles: dict[str, list[str]] = {}
    for name in states:
        roles.setdefault(name.partition(" ")[0], []).append(name)
    wrong, whole = list[str](), list[str]()
    for role, names in roles.items():
        bad = [f"{name.partition(' ')[2]}: {troubles[name]}".removeprefix(": ") for name in names if name in troubles]
        if bad[NAMED:]:
            bad[NAMED:] = [f"and {len(bad) - NAMED} more"]
        if role == "coordinator":
            wrong += [f"coordinator {each}" for each in bad]
            continue
        missing = sum(name in troubles for name in names)
        count = f"{role}s {len(names) - missing}/{len(names)}"
        (wrong if bad else whole).append(f"{count} ({'; '.join(bad)})" if bad else count)
    return wrong, whole


def _workers(slots: list[int]) -> str:
    if len(slots) > NAMED:
        return f"{len(slots)} workers"
    return f"worker{'s' * (len(slots) > 1)} {', '.join(map(str, slots))}"


def human_bytes(count: float) -> str:
    """Return a number of bytes for people, in powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
