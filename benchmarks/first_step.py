"""How long is it from the command to the end of the first step, beside torchrun with DistributedDataParallel?

    python -m benchmarks.first_step [--pairs 7]

Two workers train a small network; ours has two servers and a coordinator beside them. The two commands take turns, after one turn
that is not counted (it fills caches). Needs what `make install` installs, torchrun included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

STEP = """
import os, sys, time
import torch
from torch import nn
from torch.nn import functional
{prepare}
torch.manual_seed(0)
model = {wrap}(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
functional.cross_entropy(model(torch.randn(32, 64)), torch.randint(10, (32,))).backward()
optimizer.step()
with open("stepped-" + os.environ["RANK"], "w") as file:
    file.write(repr(time.time()))
{end}
"""
OURS = STEP.format(
    prepare="""from ps_accordion.worker import DistributedModel, connect
session = connect()
os.environ["RANK"] = str(session.rank)""",
    wrap="DistributedModel",
    end="session.close()",
)
DDP = STEP.format(
    prepare="from torch import distributed\ndistributed.init_process_group('gloo')",
    wrap="nn.parallel.DistributedDataParallel",
    end="distributed.destroy_process_group()",
)
WORKERS = 2


def main() -> None:
    """Take turns, and print each pair and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="turns of each that are counted (default: 7)")
    pairs = parser.parse_args().pairs
    print(", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy", "numba", "pyzmq")))
    with tempfile.TemporaryDirectory(prefix="psa-first-step-") as name:
        directory = Path(name)
        launch = [
            "-m",
            "ps_accordion.launcher",
            "launch",
            "--workers",
            str(WORKERS),
            "--servers",
            "2",
            "--progress",
            "none",
            "--",
        ]
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(WORKERS)]
        commands = {}
        for label, words, script in (("ours", [*launch, sys.executable], OURS), ("torchrun", torchrun, DDP)):
            (directory / f"{label}.py").write_text(script, encoding="utf-8")
            commands[label] = [sys.executable, *words, f"{label}.py"]
        seconds: dict[str, list[float]] = {label: [] for label in commands}
        for pair in range(-1, pairs):
            took = {label: first_step(command, directory) for label, command in commands.items()}
            print("  ".join(f"{label} {value:5.2f} s" for label, value in took.items()), "" if pair >= 0 else "(not counted)")
            if pair >= 0:
                for label, value in took.items():
                    seconds[label].append(value)
    for label, values in seconds.items():
        print(f"{label}: median {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})")


def first_step(command: list[str], directory: Path) -> float:
    """Run a command to its end; return the seconds from its start until the last worker had made its first step."""
    start = time.time()
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    files = [directory / f"stepped-{rank}" for rank in range(WORKERS)]
    ends = [float(file.read_text(encoding="utf-8")) for file in files]
    for file in files:
        file.unlink()
    return max(ends) - start


if __name__ == "__main__":
    main()
