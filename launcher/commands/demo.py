"""`ps-accordion demo`: train on handwritten digits through the whole system, and compare with dense training."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from ps_accordion import config
from ps_accordion.config import Settings
from ps_accordion.errors import ConfigError, PsAccordionError

from .. import local
from ..child import Guard, Program
from ..options import plain_environment
from ..progress import human_bytes
from ..screen import ProgressMode, Screen
from ..summary import Summary, summarise
from ..supervisor import supervise

__all__ = ["demo"]

BATCH = 64
"""Images a step, all workers together (as in worker/demo.py): it must split evenly."""
SETTINGS = {
    "codec.name": "topk",
    "codec.light": 0.04,
    "codec.heavy": 0.005,
    "regime.policy": "accordion",
    "regime.window": "1 epoch",
    "regime.interval": 1,
}
"""Windows are compared one epoch apart: the paper's ten would be half of this short run."""


def demo(
    *,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    epochs: int = 24,
    seed: int = 0,
    workers: int = 2,
    servers: int = 2,
    run_directory: str | None = None,
    progress: ProgressMode = "auto",
) -> int:
    """Train on handwritten digits, and compare: with dense training on one process, and with one fixed level at equal bytes.

    Args:
        json_file: Write the figures to this file, too.
        epochs: Passes over the 1,437 training images.
        seed: Seed of the network, the data order and the compression.
        workers: How many workers share each batch of 64 images.
        servers: How many servers aggregate.
        run_directory: Where the run leaves its config, events and metrics.
        progress: How to show progress: auto (live on a terminal, else a line every few seconds), line, none.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError("the demo trains on scikit-learn's handwritten digits; install it with: pip install scikit-learn")
    if epochs < 1:
        raise ConfigError(f"command line: --epochs {epochs}: expected at least 1")
    if workers >= 1 and BATCH % workers:
        raise ConfigError(f"command line: --workers {workers} does not divide the batch of {BATCH} images; use 1, 2, 4 or 8")
    directory = Path(run_directory).absolute() if run_directory else local.new_run_directory()
    roles = {"workers.count": workers, "servers.count": servers, "seed": seed}
    settings = config.load(overrides=SETTINGS | roles | {"run.directory": str(directory)})
    start = time.monotonic()
    script = (sys.executable, "-P", "-m", "ps_accordion.worker.demo", "--epochs", str(epochs), "--seed", str(seed))
    with Screen(progress) as screen:
        ending = local.run(settings, (*script, "--result", str(directory / "result-{rank}.json")), screen=screen)
        if ending.exit_code:
            return ending.exit_code
        level = _level_at_equal_bytes(summarise(directory), settings)
        screen.say(f"the same training at one fixed level, {level:.4f}, which takes as many bytes")
        fixed = {"regime.policy": "static", "codec.light": level, "run.directory": str(directory / "static")}
        ending = local.run(
            config.load(overrides=SETTINGS | roles | fixed),
            (*script, "--result", str(directory / "static-{rank}.json")),
            screen=screen,
        )
        if ending.exit_code:
            return ending.exit_code
        screen.say("the same training, dense, on one process")
        alone = local.worker_environment(0, 1, local_rank=0, local_world_size=1)
        dense_program = Program(
            "dense", "worker", (*script, "--dense", "--result", str(directory / "dense.json")), plain_environment() | alone
        )
        with Guard() as guard:
            ending = supervise([dense_program], screen=screen, guard=guard, grace=settings.timeouts.grace)
        if ending.exit_code:
            return ending.exit_code
    report = _Report.read(directory, workers, time.monotonic() - start)
    report.show(Console())
    if json_file is not None:
        report.write(json_file)
    return 0


def _level_at_equal_bytes(summary: Summary, settings: Settings) -> float:
    """Return the level that, held all the time, moves as many bytes as this run did.

    Bytes grow in proportion to the level, but for headers and small tensors; both ends are taken from the run.
    """
    light, heavy = settings.codec.light, settings.codec.heavy
    critical, settled = summary.regimes.get("critical"), summary.regimes.get("settled")
    if critical is None or settled is None:
        return light if critical is not None else heavy
    per_round = [(one.push_bytes + one.pull_bytes) / one.rounds for one in (settled, summary.total, critical)]
    return heavy + (light - heavy) * (per_round[1] - per_round[0]) / (per_round[2] - per_round[0])


@dataclass(frozen=True)
class _Report:
    """The figures of one demo."""

    results: list[dict[str, Any]]
    static: dict[str, Any]
    static_level: float
    dense: dict[str, Any]
    summary: Summary
    seconds: float

    @classmethod
    def read(cls, directory: Path, workers: int, seconds: float) -> _Report:
        results = [_load(directory / f"result-{rank}.json") for rank in range(workers)]
        if len({result["digest"] for result in results}) != 1:
            raise PsAccordionError(f"the workers ended with different parameters: {[one['digest'] for one in results]}")
        level = config.load(directory / "static" / "config.toml", environment={}).codec.light
        static = _load(directory / "static-0.json")
        return cls(results, static, level, _load(directory / "dense.json"), summarise(directory, warm_up=1), seconds)

    @property
    def push_bytes(self) -> float:
        """Bytes a worker pushed, as its sockets counted them."""
        return sum(float(result["push_bytes"]) for result in self.results) / len(self.results)

    @property
    def pull_bytes(self) -> float:
        """Bytes a worker pulled, as its sockets counted them."""
        return sum(float(result["pull_bytes"]) for result in self.results) / len(self.results)

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than dense float32, both ways together."""
        return self.summary.total.dense_bytes / (self.push_bytes + self.pull_bytes)

    @property
    def static_ratio(self) -> float:
        """The same for the run at one fixed level."""
        return self.summary.total.dense_bytes / (float(self.static["push_bytes"]) + float(self.static["pull_bytes"]))

    def switches(self) -> list[dict[str, Any]]:
        """Return the switches of the tensors that are compressed; the others stay dense in every regime."""
        steps = self.dense["steps_per_epoch"]
        return [
            {
                "epoch": (switch.round + 1) / steps,
                "round": switch.round,
                "tensor": switch.tensor,
                "regime": "critical" if switch.critical else "settled",
                "reason": switch.reason,
            }
            for switch in self.summary.switches
            if switch.tensor in self.dense["compressed"]
        ]

    def write(self, file: Path) -> None:
        """Write the figures as JSON. Bytes are a worker's mean; `dense_bytes` is both directions together."""
        switches = self.switches()
        figures = {
            "accuracy": self.results[0]["accuracy"],
            "dense_accuracy": self.dense["accuracy"],
            "static_accuracy": self.static["accuracy"],
            "static_level": self.static_level,
            "static_ratio": round(self.static_ratio, 3),
            "push_bytes": round(self.push_bytes),
            "pull_bytes": round(self.pull_bytes),
            "dense_bytes": round(self.summary.total.dense_bytes),
            "ratio": round(self.ratio, 3),
            "ratio_by_regime": {name: round(regime.ratio, 3) for name, regime in self.summary.regimes.items()},
            "rounds_by_regime": {name: regime.rounds for name, regime in self.summary.regimes.items()},
            "rounds": self.summary.total.rounds,
            "skipped_rounds": self.summary.skipped,
            "startup_bytes": round(sum(one["startup_bytes"] for one in self.results) / len(self.results)),
            "seconds": round(self.seconds, 3),
            "step_ms": round(1000 * self.summary.step_seconds, 3),
            "step_parts_ms": {name: round(1000 * part, 3) for name, part in self.summary.parts.items()},
            "regime_switches": len(switches),
            "switches": switches,
            "workers": len(self.results),
        }
        file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

    def show(self, console: Console) -> None:
        """Print the figures as tables."""
        summary = self.summary
        table = Table(
            title="Handwritten digits: this run, one fixed level at equal bytes, and dense training", title_justify="left"
        )
        table.add_column("")
        table.add_column(f"this run, {len(self.results)} workers", justify="right")
        table.add_column(f"one level, {100 * self.static_level:.2f} %", justify="right")
        table.add_column("dense, 1 process", justify="right")
        accuracies = [f"{100 * one['accuracy']:.2f} %" for one in (self.results[0], self.static, self.dense)]
        table.add_row("test accuracy", *accuracies)
        one_way = summary.total.dense_bytes / 2
        for name, moved in (("pushed", self.push_bytes), ("pulled", self.pull_bytes)):
            fixed = float(self.static["push_bytes" if name == "pushed" else "pull_bytes"])
            table.add_row(f"{name} a worker", human_bytes(moved), human_bytes(fixed), f"{human_bytes(one_way)} *")
        table.add_row("fewer bytes, both ways", f"{self.ratio:.1f}x", f"{self.static_ratio:.1f}x", "1x")
        table.add_row("training time", *(f"{one['seconds']:.1f} s" for one in (self.results[0], self.static, self.dense)))
        console.print(table)
        console.print("* what a worker would move in the same steps as float32 through servers", style="dim")
        console.print(self._regimes(), self._switch_table(), self._times())
        console.print(
            f"{self.dense['parameters']:,} parameters, equal on all workers to the last bit; "
            f"{summary.total.rounds} rounds, {summary.skipped} skipped; {self.seconds:.0f} s in all"
        )

    def _regimes(self) -> Table:
        table = Table(title="Bytes by regime", title_justify="left")
        for column in ("tensors critical", "rounds", "bytes a step", "against dense"):
            table.add_column(column, justify="left" if column == "tensors critical" else "right")
        words = {"critical": "all", "mixed": "some", "settled": "none"}
        for name, regime in self.summary.regimes.items():
            moved = (regime.push_bytes + regime.pull_bytes) / regime.rounds
            table.add_row(words[name], str(regime.rounds), human_bytes(moved), f"{regime.ratio:.1f}x fewer")
        return table

    def _switch_table(self) -> Table:
        table = Table(title="Which tensors switched when", title_justify="left")
        for column in ("epoch", "tensors", "to", "why"):
            table.add_column(column)
        groups: dict[tuple[str, str, str], list[str]] = {}
        for switch in self.switches():
            regime = "light" if switch["regime"] == "critical" else "heavy"
            group = groups.setdefault((f"{switch['epoch']:.4g}", regime, switch["reason"]), [])
            group.append(switch["tensor"].removesuffix(".weight"))
        for (epoch, regime, reason), tensors in groups.items():
            table.add_row(epoch, ", ".join(tensors), regime, reason)
        return table

    def _times(self) -> Table:
        table = Table(title=f"Where the {1000 * self.summary.step_seconds:.1f} ms of a step went", title_justify="left")
        for name in self.summary.parts:
            table.add_column(name, justify="right")
        table.caption = "compute and wait make the step; encode and decode run beside them"
        table.caption_justify = "left"
        table.add_row(*(f"{1000 * part:.1f} ms" for part in self.summary.parts.values()))
        return table


def _load(file: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return loaded
