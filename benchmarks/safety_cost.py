"""What does it cost, while nothing fails, that servers survive their process?

    python -m benchmarks.safety_cost [--pairs 5] [--steps 40]

Two workers train six linear layers of 2048 x 2048 (25 M parameters, batch 8, SGD with momentum, 1 thread a process) through two
servers with `topk` 1 %. Runs take turns: servers that keep their state in mapped files, which is the default, and servers that
keep it in memory. Step times come from the metrics of the runs, without the first ten steps of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

SCRIPT = """
import sys, time
import torch
from torch import nn
from ps_accordion.worker import DistributedModel, connect
torch.set_num_threads(1)
torch.manual_seed(0)
with connect() as session:
    model = DistributedModel(nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(6)]), session=session)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    batch = torch.randn(8, 2048)
    for _ in range(int(sys.argv[1])):
        start = time.perf_counter()
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        print("step took", time.perf_counter() - start, flush=True)
"""
WARM_UP_STEPS = 10
KEPT = {"files": "", "memory": "memory"}


def main() -> None:
    """Take turns, and print each pair and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="runs of each kind (default: 5)")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run that are counted (default: 40)")
    parser.add_argument("--json", type=Path, help="write the times to this file, too")
    options = parser.parse_args()
    print(", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy", "numba", "pyzmq")))
    times: dict[str, list[float]] = {kind: [] for kind in KEPT}
    with tempfile.TemporaryDirectory(prefix="psa-safety-") as name:
        directory = Path(name)
        (directory / "train.py").write_text(SCRIPT, encoding="utf-8")
        for pair in range(options.pairs):
            for kind, kept in KEPT.items():
                times[kind].append(1000 * step_of(directory, f"{kind}-{pair}", kept, options.steps))
            print("  ".join(f"{kind} {values[-1]:6.1f} ms a step" for kind, values in times.items()), flush=True)
    files, memory = (statistics.median(values) for values in times.values())
    shares = [(mine - theirs) / theirs for mine, theirs in zip(*times.values(), strict=True)]
    print(f"median: files {files:.1f} ms, memory {memory:.1f} ms; cost of a pair {statistics.median(shares):+.1%} (median)")
    if options.json:
        options.json.write_text(json.dumps(times, indent=2) + "\n", encoding="utf-8")


def step_of(directory: Path, run: str, kept: str, steps: int) -> float:
    """Return the median seconds of a step in a run of its own, of the slowest worker."""
    flags = ["--codec", "topk", "--light", "0.01", "--heavy", "0.01", "--policy", "static", "--workers", "2", "--servers", "2"]
    flags += ["--run-directory", run, "--progress", "none", "--set", f"servers.state_directory={kept}"]
    script = ["--", sys.executable, "train.py", str(WARM_UP_STEPS + steps)]
    command = [sys.executable, "-m", "ps_accordion.launcher", "launch", *flags, *script]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    took: dict[str, list[float]] = {}
    for line in done.stdout.splitlines():
        worker, _, seconds = line.partition("step took")
        took.setdefault(worker, []).append(float(seconds))
    return max(statistics.median(values[WARM_UP_STEPS:]) for values in took.values())


if __name__ == "__main__":
    main()
