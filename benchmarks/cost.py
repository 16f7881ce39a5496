"""What does a round cost the processors, how does that grow with workers and servers, and how much memory does a job take?

    python -m benchmarks.cost [--cases topk:0.01,onebit:8192,dense:32] [--turns 7] [--json FILE]

Processor: `bench pushpull` (a tensor of 100 MiB, Unix sockets) with 2, 4 and 8 workers, and with 1, 2 and 4 servers. Seconds are
those of a worker's and of all servers' threads; a gigabyte is one of gradients, of one worker there and of all workers here.
Memory: what processes have resident after some rounds of a tensor of 100 MiB, beyond what they had when they had only pushed a
small one, beside the formula (`ps_accordion/capacity/memory.py`). One worker is late each time, so that servers hold all that the
other has pushed: how much they hold would be chance otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ps_accordion import capacity, config
from ps_accordion.capacity import Job, Link
from ps_accordion.cores import codec_threads
from ps_accordion.launcher import job_speed, local
from ps_accordion.launcher.job_speed import Case
from ps_accordion.launcher.machine import machine
from ps_accordion.launcher.screen import Screen
from ps_accordion.layout import Tensor
from ps_accordion.regimes.base import Choice
from ps_accordion.worker import connect
from ps_accordion.worker.processor import servers

ELEMENTS = 25 << 20
GIGABYTES = 4 * ELEMENTS / 1e9
GROWTH = ((2, 1), (2, 2), (2, 4), (4, 2), (8, 2))
"""Workers and servers."""
ROUNDS = 6
"""Before memory is looked at: residuals have both halves then, and scratch its size."""
LATE_S = 0.5
"""How much later than the first the second worker pushes then: what it shares with the first is held until it does."""
CASES = "topk:0.01,onebit:8192,dense:32"


def main() -> None:
    """Measure both, and print a table of each."""
    if len(sys.argv) > 1 and sys.argv[1] == "hold":
        hold(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help=f"codec:level,... (default: {CASES})")
    parser.add_argument("--turns", type=int, default=7, help="rounds that are counted (default: 7)")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    options = parser.parse_args()
    # Machines of a network have no memory in common.
    cases = [
        Case(name, float(level), lane=False) for name, _, level in (text.partition(":") for text in options.cases.split(","))
    ]
    print(json.dumps(machine()))
    rows = [row for case in cases for row in growth(case, options.turns)]
    print()
    held = [row for case in cases for row in memory(case)]
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine(), "rows": rows, "memory": held}, indent=2) + "\n", encoding="utf-8"
        )


def growth(case: Case, turns: int) -> list[dict[str, Any]]:
    """Print and return the processor time of a round for each number of workers and servers."""
    rows = []
    for workers, count in GROWTH:
        job = job_speed.Job(workers, count, 1, "ipc", turns, ELEMENTS)
        took = job_speed.measured(case, job, ("pushpull", "--elements", str(ELEMENTS)))
        if isinstance(took, int):
            raise SystemExit(took)
        spent = took.fields["cpu_ms"]
        worker, server = (sum(ms for kind, ms in spent.items() if kind.startswith(who)) / 1e3 for who in ("worker", "server"))
        row = {
            "case": took.fields["case"],
            "workers": workers,
            "servers": count,
            "ms": round(statistics.median(took.times["ours"]), 1),
            "worker_s_per_gb": round(worker / GIGABYTES, 3),
            "servers_s_per_gb": round(server / GIGABYTES / workers, 3),
            "cpu_ms": spent,
        }
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items() if name != "cpu_ms"), flush=True)
    return rows


def memory(case: Case) -> list[dict[str, Any]]:
    """Print and return what a worker and a server hold, beside the formula."""
    settings = {
        "workers.count": 2,
        "servers.count": 2,
        "codec.name": case.codec,
        "codec.light": case.level,
        "codec.heavy": case.level,
        "servers.lane": "off",
        "regime.policy": "static",
    }
    with tempfile.TemporaryDirectory(prefix="psa-cost-") as name, Screen("none") as screen:
        loaded = config.load(overrides=settings | {"run.directory": f"{name}/run"})
        command = (sys.executable, "-m", "benchmarks.cost", "hold", f"{name}/held")
        if code := local.run(loaded, command, screen=screen).exit_code:
            raise SystemExit(code)
        held = json.loads(Path(name, "held").read_text(encoding="utf-8"))
    here = Link(float("inf"))
    expected = capacity.memory_of(
        Job(
            tensors=(Tensor("tensor", (1, ELEMENTS), "float32"),),
            choice=Choice(case.codec, case.level),
            workers=2,
            servers=2,
            shards_per_server=loaded.servers.shards_per_server,
            worker_link=here,
            server_link=here,
            worker_cores=os.cpu_count() or 1,
            server_cores=os.cpu_count() or 1,
            threads=codec_threads(os.cpu_count() or 1),
            partition_elements=loaded.partition_elements,
            replay_rounds=loaded.servers.replay_rounds,
        )
    )
    rows = []
    for who, parts in (("worker", expected.worker), ("server", expected.server)):
        formula = sum(parts.values())
        row = {
            "case": f"{case.codec}:{case.level:g}",
            "who": who,
            "mb": round(held[who] / 1e6, 1),
            "formula_mb": round(formula / 1e6, 1),
        }
        row |= {"off": round(held[who] / formula - 1, 3), "parts": parts}
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items() if name != "parts"), flush=True)
    return rows


def hold(file: Path) -> None:
    """Be a worker: push a small tensor, look, push a large one, and look again; the first writes what came to be held."""
    torch.set_num_threads(1)
    with connect() as session:
        large = torch.randn(1, ELEMENTS, generator=torch.Generator().manual_seed(session.rank))
        session.push_pull(torch.randn(1, 1 << 16), name="small")
        before = _resident(session.rank)
        for _ in range(ROUNDS):
            time.sleep(LATE_S * session.rank)
            session.push_pull(large, name="large")
        after = _resident(session.rank)
        session.push_pull(torch.zeros(1, 1 << 16), name="small")  # nobody leaves before the first has looked
        if session.rank == 0:
            grown = [now - then for now, then in zip(after, before, strict=True)]
            file.write_text(json.dumps({"worker": grown[0], "server": max(grown[1:])}), encoding="utf-8")


def _resident(rank: int) -> list[int]:
    """Return the resident bytes of this process and, at the first worker, of each server."""
    here = [Path("/proc/self"), *(sorted(servers()) if rank == 0 else [])]
    page = os.sysconf("SC_PAGE_SIZE")
    return [page * int((process / "statm").read_text(encoding="utf-8").split()[1]) for process in here]


if __name__ == "__main__":
    main()
