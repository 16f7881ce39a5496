"""What happens when a link breaks without a word: who says so and when, when do rounds go on, and does the worker come back?

    python -m benchmarks.cut_link [--only worker,worker-server,server] [--json FILE]

Three hosts, each a network namespace (`hosts.py`; needs root): one has the coordinator and worker 0, one the server, and one
worker 1. What is sent over the broken link vanishes, and no socket is told. All settings are the defaults. Three cases:

    worker         worker 1 is cut off from all until it has been taken out of the run, and 5 s longer
    worker-server  the same, but from the server only: the coordinator hears worker 1 all the time
    server         the server is cut off from all for 10 s

Whatever happens, the run must go on, and both workers must end with the same parameters; else this ends with an error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import hosts
from benchmarks.jobs import Processes
from ps_accordion import config
from ps_accordion.launcher.machine import machine
from ps_accordion.launcher.progress import Tail

CASES = ("worker", "worker-server", "server")
PATIENCE = 150.0
"""Seconds without anything to be seen that count as a hang."""
LOOK_S = 0.02
AWAY_S = 10.0
"""How long the server is cut off."""
TRAIN = """
import hashlib, os, sys, time
from pathlib import Path
import torch
from torch import nn
from ps_accordion.worker import DistributedModel, connect
torch.set_num_threads(1)
rank, last = int(os.environ["PS_ACCORDION_RANK"]), Path(sys.argv[1])
with connect() as session:
    torch.manual_seed(0)
    model = DistributedModel(nn.Linear(64, 64), session=session)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session.track(optimizer)
    for step in session.steps(1_000_000):
        if last.exists() and step >= int(last.read_text()):
            break
        time.sleep(0.02)  # the work of a step
        draw = torch.Generator().manual_seed(1000 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(4, 64, generator=draw)).square().mean().backward()
        optimizer.step()
    bits = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    print("FINAL", rank, hashlib.sha256(bits).hexdigest(), flush=True)
"""


class Said(NamedTuple):
    """One line of a log: who wrote it, when by the clock that all processes share, and what."""

    who: str
    when: float
    what: dict[str, Any]


def main() -> None:
    """Play each case, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="cases to play (default: all)")
    parser.add_argument("--json", type=Path, help="write what was seen to this file, too")
    options = parser.parse_args()
    cases = options.only.split(",")
    if unknown := [case for case in cases if case not in CASES]:
        parser.error(f"--only: expected some of {','.join(CASES)}, got {unknown[0]!r}")
    print(json.dumps(machine()))
    rows = []
    for case in cases:
        try:
            with (
                hosts.hosts(3, "1gbit") as made,
                tempfile.TemporaryDirectory(prefix="psa-cut-") as name,
                started(made, Path(name)) as run,
            ):
                rows.append({"case": case} | played(case, made, run))
        except hosts.Unavailable as error:
            print(f"not measured: {error}", file=sys.stderr)
            raise SystemExit(0) from None
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")


class Run:
    """A run whose logs are read while it goes on.

    Args:
        directory: Its run directory.
        last: The file that workers read their last step from.
        processes: All of them.
    """

    def __init__(self, directory: Path, last: Path, processes: Processes) -> None:
        self.last, self.processes = last, processes
        self.said: list[Said] = []
        self.round = -1
        """The newest round that worker 0 has decided."""
        self.decided: list[tuple[float, int]] = []
        names = ("events-coordinator", "events-server-0", "events-worker-0", "events-worker-1", "metrics-worker-0")
        self._tails = {name: Tail(directory / f"{name}.jsonl") for name in names}

    def look(self) -> None:
        """Read what is new."""
        for name, tail in self._tails.items():
            for line in tail.read():
                if name.startswith("metrics"):
                    self.round = line["round"]
                    self.decided.append((line["time"], line["round"]))
                else:
                    self.said.append(Said(name.removeprefix("events-"), line["time"], line))

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Look until something is so; return it."""
        began = time.monotonic()
        while not (found := condition()):
            failed = [code for code in self.processes.codes() if code]
            if time.monotonic() - began > PATIENCE or failed:
                raise SystemExit(f"waited {time.monotonic() - began:.0f} s until {what}\n{self.processes.said()}")
            time.sleep(LOOK_S)
            self.look()
        return found

    def first(self, after: float, **fields: Any) -> Said | None:
        """Return the first line after a time that has these fields."""
        return next((said for said in self.said if said.when >= after and fields.items() <= said.what.items()), None)

    def end(self) -> list[str]:
        """Have the workers end; return the hashes of their parameters."""
        unfinished = self.last.with_suffix(".new")
        unfinished.write_text(str(self.round + 50))
        unfinished.replace(self.last)
        self.until(lambda: len(self._finals()) == 2, "both workers have ended")
        return self._finals()

    def _finals(self) -> list[str]:
        return re.findall(r"FINAL \d ([0-9a-f]{64})", self.processes.said())


def played(case: str, made: list[hosts.Host], run: Run) -> dict[str, Any]:
    """Break a link, wait for what must follow, mend it, and have the run end; return the times in seconds."""
    first, server, second = made
    pairs = {
        "worker": [(second, first), (second, server)],
        "worker-server": [(second, server)],
        "server": [(server, first), (server, second)],
    }[case]
    run.until(lambda: run.round >= 100, "100 rounds are made")
    cut = time.time()
    for pair in pairs:
        hosts.sever(*pair)
    missed = "worker 1" if case == "worker" else "server 0"
    silent = run.until(lambda: run.first(cut, event="silent", name=missed), f"{missed} is missed")
    seen = {"said_after_s": round(silent.when - cut, 2), "said_by": silent.who}
    if case == "server":
        time.sleep(max(0.0, cut + AWAY_S - time.time()))
    else:
        view = run.until(lambda: run.first(cut, event="view", new=[]), "worker 1 is taken out")
        before = run.round
        run.until(lambda: run.round > before + 10, "the others go on")
        seen |= {"taken_out_after_s": round(view.when - cut, 2)}
        seen |= {"rounds_again_after_s": round(min(when for when, _ in run.decided if when > view.when) - cut, 2)}
        time.sleep(5)
    mended = time.time()
    for pair in pairs:
        hosts.mend(*pair)
    if case == "server":
        run.until(lambda: run.decided[-1][0] > mended, "rounds go on")
        seen |= {"rounds_again_after_s": round(min(when for when, _ in run.decided if when > mended) - mended, 2)}
        if view := run.first(cut, event="view", new=[]):
            seen |= {"taken_out": view.what["removed"]}
    else:
        back = run.until(lambda: run.first(mended, event="view", new=[1]), "worker 1 is back")
        seen |= {"back_after_s": round(back.when - mended, 2)}
    seen |= {"rounds": run.round}
    if len(set(run.end())) > 1:
        raise SystemExit(f"{case}: the replicas differ at the end")
    return seen


@contextlib.contextmanager
def started(made: list[hosts.Host], directory: Path) -> Iterator[Run]:
    """Start the processes of a run; end them on the way out."""
    first, server, second = made
    last, script = directory / "last", directory / "train.py"
    script.write_text(TRAIN, encoding="utf-8")
    settings = config.load(
        overrides={
            "workers.count": 2,
            "servers.count": 1,
            "codec.name": "topk",
            "coordinator.address": f"tcp://{first.address}:5650",
            "servers.bind": f"tcp://{server.address}:*",
            "servers.state_directory": str(directory / "state"),
            "run.directory": str(directory / "run"),
        }
    )
    file = directory / "job.toml"
    file.write_text(config.render(settings), encoding="utf-8")
    program, given = [sys.executable, "-m", "ps_accordion.launcher"], ["--config", str(file)]
    train = ["--", sys.executable, str(script), str(last)]
    with Processes(directory / "printed") as processes:
        processes.run(first, *program, "coordinator", *given, "--insecure")
        processes.run(server, *program, "server", "--number", "0", *given, "--insecure")
        processes.run(first, *program, "worker", "--rank", "0", *given, *train)
        processes.run(second, *program, "worker", "--rank", "1", *given, *train)
        yield Run(directory / "run", last, processes)
        processes.wait(60)


if __name__ == "__main__":
    main()
