"""What a finished run did, added up from its run directory: bytes, times, regimes, switches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ps_accordion.errors import PsAccordionError

from .progress import Tail

__all__ = ["Regime", "Summary", "Switch", "summarise"]

PARTS = ("compute", "wait", "encode", "decode")
"""Where the time of a step goes, as the metrics name it. `compute` (up to the last gradient) and `wait` (from there until the
round is decided) follow each other and make the step; `encode` and `decode` run beside them on the codec threads."""


class Regime(NamedTuple):
    """The rounds of one regime.

    Attributes:
        rounds: How many.
        push_bytes, pull_bytes: What a worker moved in them, mean over workers.
        dense_bytes: What dense float32 would have moved in both directions together.
    """

    rounds: int
    push_bytes: float
    pull_bytes: float
    dense_bytes: float

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than dense, both ways together."""
        moved = self.push_bytes + self.pull_bytes
        return self.dense_bytes / moved if moved else 0.0


class Switch(NamedTuple):
    """One tensor that changed its regime.

    Attributes:
        round: Round after which the coordinator decided.
        tensor: Its name.
        critical: The regime it changed to.
        reason: The plan's reason.
    """

    round: int
    tensor: str
    critical: bool
    reason: str


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        total: All rounds.
        regimes: Rounds by regime: `critical` (all tensors), `mixed`, `settled` (none); those without rounds are left out.
        parts: Mean seconds a step by part, as in `PARTS`.
        step_seconds: Mean seconds a step.
        switches: Every change of a tensor's regime, in order.
        skipped: Rounds that were skipped.
    """

    total: Regime
    regimes: dict[str, Regime]
    parts: dict[str, float]
    step_seconds: float
    switches: tuple[Switch, ...]
    skipped: int


def summarise(directory: Path, *, layout: int = 0, warm_up: int = 0) -> Summary:
    """Read a run directory.

    Args:
        directory: The run directory.
        layout: The layout whose rounds count.
        warm_up: Rounds at the start that are left out of the times, not of the bytes.

    Raises:
        PsAccordionError: The directory holds no metrics of that layout.
    """
    workers = sorted(directory.glob("metrics-worker-*.jsonl"))
    rows = [row for file in workers for row in Tail(file).read() if row.get("layout", 0) == layout]
    if not rows:
        raise PsAccordionError(f"{str(directory)!r} holds no metrics: no worker finished a round")
    regimes = {}
    for name in ("critical", "mixed", "settled"):
        chosen = [row for row in rows if _regime(row) == name]
        if chosen:
            regimes[name] = _added(chosen, len(workers))
    timed = [row for row in rows if row["round"] >= warm_up] or rows
    parts = {name: sum(row[f"{name}_s"] for row in timed) / len(timed) for name in PARTS}
    step = sum(row["step_s"] for row in timed) / len(timed)
    return Summary(
        total=_added(rows, len(workers)),
        regimes=regimes,
        parts=parts,
        step_seconds=step,
        switches=tuple(_switches(directory, layout)),
        skipped=len({row["round"] for row in rows if row.get("kind") == "SKIP"}),
    )


def _regime(row: dict[str, Any]) -> str:
    share = row["critical_share"]
    return "critical" if share >= 1 else "settled" if share <= 0 else "mixed"


def _added(rows: list[dict[str, Any]], workers: int) -> Regime:
    def mean(name: str) -> float:
        total: float = sum(row[name] for row in rows)
        return total / workers

    return Regime(len({row["round"] for row in rows}), mean("push_bytes"), mean("pull_bytes"), 2 * mean("dense_bytes"))


def _switches(directory: Path, layout: int) -> list[Switch]:
    events = Tail(directory / "events-coordinator.jsonl").read()
    plans = [event for event in events if event["event"] == "plan" and event.get("layout", 0) == layout]
    switches = []
    before: dict[str, bool] = {}
    for plan in plans:
        for tensor, critical in zip(plan["names"], plan["critical"], strict=True):
            if before.get(tensor, True) != critical:  # every run starts with all tensors critical
                switches.append(Switch(plan["round"], tensor, bool(critical), plan["reason"]))
            before[tensor] = bool(critical)
    return switches
