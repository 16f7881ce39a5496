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
from pathlib import Path

from benchmarks import turns
from ps_accordion.launcher.machine import machine

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
    print(json.dumps(machine()))
    times: dict[str, list[float]] = {job: [] for job in JOBS}
    written = []
    with tempfile.TemporaryDirectory(prefix="psa-safety-") as name, contextlib.ExitStack() as stack:
        running = {job: stack.enter_context(launched(Path(name), job)) for job in JOBS}
        for turn in range(WARM_UP + options.pairs):
            for job in JOBS if turn % 2 else reversed(JOBS):
                times[job].append(statistics.median(running[job].take(options.steps)))
                began = time.perf_counter()
                os.sync()
                if job == "protected":
                    written.append(1000 * (time.perf_counter() - began) / options.steps)
            if turn >= WARM_UP:
                print("  ".join(f"{job} {values[-1]:6.1f} ms a step" for job, values in times.items()), flush=True)
        for waiting in running.values():
            waiting.end()
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
def launched(directory: Path, job: str) -> Iterator[turns.Turns]:
    """Start a job, whose output goes to `JOB.log`; end it on the way out."""
    flags = ["--codec", "topk", "--light", "0.01", "--heavy", "0.01", "--policy", "static", "--workers", str(WORKERS)]
    flags += ["--servers", "2", "--run-directory", str(directory / job), "--progress", "none"]
    environment = dict(os.environ)
    if job == "unprotected":
        flags += ["--set", "servers.state_directory=memory"]
        environment["PYTHONPATH"] = str(Path(__file__).with_name("unprotected").resolve())
    training = [sys.executable, "-m", "benchmarks.training", "ours", "--turns", str(directory), "--job", job]
    command = [sys.executable, "-m", "ps_accordion.launcher", "launch", *flags, "--", *training]
    log = directory / f"{job}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        yield turns.Turns(directory, job, WORKERS, lambda: process.poll() is None)
        if process.wait(timeout=60):
            raise turns.Stopped(f"the {job} job ended with exit code {process.returncode}")
    except turns.Stopped as error:
        raise SystemExit(f"{error}:\n{log.read_text(errors='replace')[-4000:]}") from None
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
