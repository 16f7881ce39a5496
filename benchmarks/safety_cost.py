"""What does it cost, while nothing fails, that servers outlive their process and that every gradient is accounted for?

    python -m benchmarks.safety_cost [--pairs 15] [--steps 4]

Two jobs run at the same time and take turns of a few steps each; the one that waits only says now and then that it lives. One is
the product as people get it. The other keeps its servers' state in memory instead of checksummed mapped files, and has no loss
ledger (`unprotected/sitecustomize.py`; the product has no such switch). Each trains six linear layers of 2048 x 2048 (25 M
parameters, batch 8, SGD with momentum, 1 thread a process) with two workers through two servers, `topk` 1 % on loopback.

The kernel writes mapped files to the disk when it likes, in whoever's turn. So after every turn the benchmark waits for the disk
(`sync`), outside both times, and prints what that took for a step of the protected job. Left alone, the kernel waits up to 30 s,
so that many steps share a write.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib import metadata
from pathlib import Path

from torch.distributed import DistStoreError, TCPStore

SCRIPT = """
import json, sys, time
from datetime import timedelta
import torch
from torch import nn
from torch.distributed import TCPStore
from ps_accordion.worker import DistributedModel, connect
job, port, turns, steps = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
torch.manual_seed(0)
store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(minutes=5))
with connect() as session:
    model = DistributedModel(nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(6)]), session=session)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    batch = torch.randn(8, 2048)
    for turn in range(turns):
        store.wait([f"{job}/{turn}"])
        took = []
        for _ in range(steps):
            start = time.perf_counter()
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            took.append(1000 * (time.perf_counter() - start))
        store.set(f"{job}/{turn}/{session.rank}", json.dumps(took))
"""
WORKERS = 2
WARM_UP = 2
"""Turns of each that are not counted."""
JOBS = ("protected", "unprotected")


def main() -> None:
    """Let the two jobs take turns, and print each pair and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="turns of each that are counted (default: 15)")
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn (default: 4)")
    parser.add_argument("--json", type=Path, help="write the times to this file, too")
    options = parser.parse_args()
    print(", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy", "numba", "pyzmq")))
    turns = WARM_UP + options.pairs
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5))
    times: dict[str, list[float]] = {job: [] for job in JOBS}
    written = []
    with tempfile.TemporaryDirectory(prefix="psa-safety-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        (directory / "train.py").write_text(SCRIPT, encoding="utf-8")
        running = {job: stack.enter_context(launched(directory, job, store.port, turns, options.steps)) for job in JOBS}
        for turn in range(turns):
            for job in JOBS if turn % 2 else reversed(JOBS):
                store.set(f"{job}/{turn}", "go")
                try:
                    steps = [json.loads(store.get(f"{job}/{turn}/{rank}")) for rank in range(WORKERS)]
                except DistStoreError:
                    raise SystemExit(f"the {job} job does not answer:\n{(directory / f'{job}.log').read_text()}") from None
                times[job].append(statistics.median(max(step) for step in zip(*steps, strict=True)))
                began = time.perf_counter()
                os.sync()
                if job == "protected":
                    written.append(1000 * (time.perf_counter() - began) / options.steps)
            if turn >= WARM_UP:
                print("  ".join(f"{job} {values[-1]:6.1f} ms a step" for job, values in times.items()), flush=True)
        for job, process in running.items():
            if process.wait():
                raise SystemExit(f"the {job} job ended with code {process.returncode}:\n{(directory / f'{job}.log').read_text()}")
    protected, unprotected = (values[WARM_UP:] for values in times.values())
    shares = sorted(mine / theirs - 1 for mine, theirs in zip(protected, unprotected, strict=True))
    print(f"medians: protected {statistics.median(protected):.1f} ms, unprotected {statistics.median(unprotected):.1f} ms a step")
    print(f"cost of a pair: median {statistics.median(shares):+.1%}, half of them between {_quarters(shares)}")
    print(f"writing the mapped files to the disk afterwards: median {statistics.median(written[WARM_UP:]):.1f} ms a step")
    if options.json:
        options.json.write_text(json.dumps(times | {"written": written}, indent=2) + "\n", encoding="utf-8")


def _quarters(values: list[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:+.1%} and {high:+.1%}"


@contextlib.contextmanager
def launched(directory: Path, job: str, port: int, turns: int, steps: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a job, whose output goes to `JOB.log`; end it on the way out."""
    flags = ["--codec", "topk", "--light", "0.01", "--heavy", "0.01", "--policy", "static", "--workers", str(WORKERS)]
    flags += ["--servers", "2", "--run-directory", job, "--progress", "none"]
    environment = dict(os.environ)
    if job == "unprotected":
        flags += ["--set", "servers.state_directory=memory"]
        environment["PYTHONPATH"] = str(Path(__file__).with_name("unprotected").resolve())
    script = ["--", sys.executable, "train.py", job, str(port), str(turns), str(steps)]
    command = [sys.executable, "-m", "ps_accordion.launcher", "launch", *flags, *script]
    with (directory / f"{job}.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
