"""Pictures of measured rows: bars of what a step takes, a panel a link; curves of accuracy over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["save_curves", "save_steps"]

COLOURS = {"alone": "#8a8a8a", "baseline": "#c0703a", "ours": "#2f6f9f"}


def save_steps(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Save a picture of the milliseconds a step, shortest first; the file's ending says of which kind (.svg, .png, .pdf).

    Args:
        rows: As `vs_ddp` writes them: each of ours beside each baseline.
        file: Overwritten.
    """
    # Only here: it takes half a second, and measuring must work without it.
    from matplotlib.figure import Figure

    links = list(dict.fromkeys(row["link"] for row in rows))
    figure = Figure(figsize=(8, 0.6 + 2.6 * len(links)), layout="constrained")
    for axes, link in zip(figure.subplots(len(links), squeeze=False)[:, 0], links, strict=True):
        bars = {row["baseline"]: (row["baseline_ms"], _kind(row["baseline"])) for row in rows if row["link"] == link}
        bars |= {row["case"]: (row["ms"], "ours") for row in rows if row["link"] == link}
        names = sorted(bars, key=lambda name: -bars[name][0])
        drawn = axes.barh(names, [bars[name][0] for name in names], color=[COLOURS[bars[name][1]] for name in names])
        axes.bar_label(drawn, fmt="%.0f", padding=3)
        axes.margins(x=0.1)
        axes.set_xlabel(f"ms a step at {link} a host")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def save_curves(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Save a picture of accuracy over seconds, the axis of which is logarithmic; one line a run, one colour a case.

    Args:
        rows: As `to_accuracy` writes them.
        file: Overwritten.
    """
    from matplotlib.figure import Figure  # as above

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, case in enumerate(dict.fromkeys(row["case"] for row in rows)):
        for row in (row for row in rows if row["case"] == case):
            seconds, accuracy = ([seen[name] for seen in row["curve"]] for name in ("seconds", "accuracy"))
            axes.plot(seconds, accuracy, color=f"C{number}", alpha=0.8, label=case if row["seed"] == 0 else None)
    axes.set_xscale("log")
    axes.set_xlabel(f"seconds of training at {rows[0]['link']} a host")
    axes.set_ylabel("accuracy on digits that were not trained on")
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def _kind(name: str) -> str:
    return "alone" if name == "alone" else "baseline"
