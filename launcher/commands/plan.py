"""`ps-accordion plan`: what a job would take on machines, and how many servers it wants, before any of them runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from ps_accordion import capacity
from ps_accordion.capacity import Candidate, Compute, Job, Link
from ps_accordion.codecs import registry, suite
from ps_accordion.cores import codec_threads
from ps_accordion.errors import CodecError, ConfigError
from ps_accordion.layout import Tensor
from ps_accordion.regimes.base import Choice
from ps_accordion.selection import levels_of

from ..coefficients import costs_now, read_benches
from ..machine import machine
from ..progress import human_bytes
from .bench_codecs import bar

__all__ = ["plan"]

MARK = "◀"
SIMULATED_WORKERS = 64
"""Workers that are simulated one by one; of more, each stands for several, which changes a step by less than 1 %."""


def plan(
    *,
    workers: int,
    bandwidth: str,
    model: str = "resnet50",
    parameters: int = 0,
    codec: str = "topk",
    level: float | None = None,
    compute: str = "0",
    optimizer: str = "0",
    servers: int = 0,
    shards_per_server: int = 0,
    server_bandwidth: str = "",
    delay: str = "0",
    colocated: Annotated[bool, Parameter(negative=())] = False,
    worker_cores: int = 0,
    server_cores: int = 0,
    cores_shared: int = 0,
    threads: int = 0,
    replay_rounds: int = 0,
    coefficients: Annotated[Sequence[Path], Parameter(negative=())] = (),
    save: Path | None = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> int:
    """Predict the time of a step, processor time and memory, and recommend how many servers and shards to run.

    One step passes in a simulation of every thread and every link. What its work costs was measured: by `ps-accordion bench`,
    whose JSON files `--coefficients` names, or, as far as they lack something, on this machine now, in about a minute. So run it,
    or the benches, on a machine like those that will train.

    Args:
        workers: How many workers train, each on a host of its own.
        bandwidth: Of every host's link, in each direction, such as 10Gbit or 100Mbit.
        model: What is trained: resnet50, bert-base, or a JSON file with the list [[name, [dimension, ...]], ...], as in
            json.dumps([[name, list(p.shape)] for name, p in model.named_parameters()]).
        parameters: How many parameters it has, if no more is known; takes the place of --model.
        codec: Codec of the tensors that are worth compressing.
        level: Its level. Not given: the codec's light level, at which a step takes longest.
        compute: Forward and backward of one step on a worker that shares nothing, such as 120ms; two thirds of it are taken for
            backward, which multiplies twice where forward does once. 0 asks for communication alone.
        optimizer: What the optimizer takes after that.
        servers: How many servers to predict for; 0 takes what is recommended.
        shards_per_server: Shards, and so compute threads, in each of them; 0 takes what is recommended, or 1 with --servers.
        server_bandwidth: Of the links of servers' hosts; empty for that of the workers'.
        delay: How long a packet takes from one host to another, half of a round trip.
        colocated: Servers on the workers' hosts, instead of hosts of their own.
        worker_cores: Cores of a worker's host; 0 takes those of this machine.
        server_cores: Cores of a server's host; 0 takes those of this machine.
        cores_shared: Cores that all hosts share, as containers and namespaces on one machine do; 0 if they do not.
        threads: Codec threads of a worker; 0 takes one a core, at most four, as workers do.
        replay_rounds: Rounds whose pushes workers keep ([servers] replay_rounds).
        coefficients: Files that `ps-accordion bench codecs --json` and `bench pushpull --json` have written; may be given again.
        save: Write what was measured now to this file, for --coefficients.
        json_file: Write the figures to this file, too.
    """
    for flag, count in (("workers", workers), ("servers", servers), ("shards-per-server", shards_per_server)):
        if count < (flag == "workers"):
            raise ConfigError(f"command line: --{flag} {count}: expected at least {int(flag == 'workers')}")
    cores = machine()["cores"]
    rate = capacity.bits_per_second(bandwidth, source="command line: --bandwidth")
    there = capacity.bits_per_second(server_bandwidth, source="command line: --server-bandwidth") if server_bandwidth else rate
    half_way = capacity.seconds(delay, source="command line: --delay") / 2
    computing = capacity.seconds(compute, source="command line: --compute")
    job = Job(
        tensors=tuple(_tensors(model, parameters)),
        choice=_choice(codec, level),
        workers=workers,
        servers=servers or 1,
        shards_per_server=shards_per_server or 1,
        worker_link=Link(rate, half_way),
        server_link=Link(there, half_way),
        worker_cores=worker_cores or cores,
        server_cores=server_cores or cores,
        threads=threads or codec_threads(worker_cores or cores),
        compute=Compute(computing / 3, computing * 2 / 3, capacity.seconds(optimizer, source="command line: --optimizer")),
        colocated=colocated,
        shared_cores=cores_shared,
        replay_rounds=replay_rounds,
    )
    console = Console()
    costs, benches = costs_now(job.choices, read_benches(coefficients), told=lambda text: _say(console, text))
    if save is not None:
        save.write_text(json.dumps({"machine": machine(), "rows": benches[-1].rows}, indent=2) + "\n", encoding="utf-8")
    if job.bucketed and computing:  # every gradient is copied into its bucket, as backward makes it
        copying = costs.copy * job.elements
        job = replace(job, compute=job.compute._replace(backward=job.compute.backward + copying))
    found = capacity.candidates(job, costs)
    best = capacity.recommended(found).job
    asked = replace(job, servers=servers or best.servers, shards_per_server=shards_per_server or best.shards_per_server)
    if servers and not shards_per_server:
        asked = replace(asked, shards_per_server=1)
    step = capacity.simulate(asked, costs, most_workers=SIMULATED_WORKERS)
    predicted = Candidate(asked, step)
    _show(console, f"{parameters:,} parameters" if parameters else model, predicted, found, best)
    if json_file is not None:
        figures = {
            "machine": machine(),
            "costs": {"copy_s": costs.copy, "worker": costs.worker, "server": costs.server},
            "predicted": _row(predicted),
            "recommended": {"servers": best.servers, "shards_per_server": best.shards_per_server},
            "rows": [_row(one) for one in found],
        }
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _tensors(model: str, parameters: int) -> list[Tensor]:
    if parameters:
        return capacity.of_parameters(parameters)
    return capacity.MODELS[model]() if model in capacity.MODELS else capacity.read_table(Path(model))


def _choice(codec: str, level: float | None) -> Choice:
    try:
        choice = Choice(codec, levels_of(codec)[0] if level is None else level)
        registry.find(suite(), codec).check_level(choice.level)
    except CodecError as error:
        raise ConfigError(f"command line: --codec or --level: {error}") from None
    return choice


def _row(candidate: Candidate) -> dict[str, Any]:
    """Return what is known of a candidate, with units in the names."""
    job, step = candidate
    memory = capacity.memory_of(job)
    return {
        "workers": job.workers,
        "servers": job.servers,
        "shards_per_server": job.shards_per_server,
        "codec": job.choice.codec,
        "level": job.choice.level,
        "elements": job.elements,
        "colocated": job.colocated,
        "ms": round(1e3 * step.seconds, 3),
        "compute_ms": round(1e3 * step.compute, 3),
        "limit": step.limit,
        "busy": {name: round(share, 4) for name, share in step.busy.items()},
        "worker_cpu_s": round(step.worker_cpu, 6),
        "server_cpu_s": round(step.server_cpu, 6),
        "bytes_a_worker": round(2 * step.worker_bytes),
        "server_memory_bytes": memory.server,
        "worker_memory_bytes": memory.worker,
    }


def _say(console: Console, text: str) -> None:
    console.print(text, style="dim", highlight=False, soft_wrap=True)


def _show(console: Console, model: str, predicted: Candidate, found: Sequence[Candidate], best: Job) -> None:
    job, step = predicted
    where = "on the workers' hosts" if job.colocated else f"at {capacity.bits_text(job.server_link.bits)}"
    console.print(
        f"\n{Path(model).name}, {job.elements / 1e6:.1f} M parameters, {job.choice.codec} {job.choice.level:g}: {job.workers} "
        f"workers at {capacity.bits_text(job.worker_link.bits)}, servers {where}",
        style="bold",
        highlight=False,
    )
    caption = (
        f"{MARK} recommended: the fewest whose step is within {capacity.NEARLY - 1:.0%} of the shortest. CPU: all servers, a step"
    )
    table = Table(caption=caption, caption_justify="left")
    for heading in ("servers", "shards", "step ms", "CPU s", "a server's memory", "limited by", ""):
        table.add_column(heading, justify="left" if heading in ("limited by", "") else "right", no_wrap=True)
    for one in found:
        recommended = (one.job.servers, one.job.shards_per_server) == (best.servers, best.shards_per_server)
        table.add_row(
            str(one.job.servers),
            str(one.job.shards_per_server),
            f"{1e3 * one.step.seconds:.1f}",
            f"{one.step.server_cpu:.3f}",
            human_bytes(sum(capacity.memory_of(one.job).server.values())),
            one.step.limit,
            MARK if recommended else "",
            style="bold" if recommended else "",
        )
    console.print(table)
    console.print(
        f"\n{job.servers} servers of {job.shards_per_server} shards: a step takes {1e3 * step.seconds:.1f} ms, of which a worker "
        f"computes {1e3 * step.compute:.1f}; limited by: {step.limit}",
        style="bold",
        highlight=False,
    )
    busy = Table(caption="share of the step in which the busiest one works", title_justify="left", caption_justify="left")
    busy.add_column("what", no_wrap=True)
    busy.add_column("busy", justify="right", no_wrap=True)
    busy.add_column("", no_wrap=True)
    for name, share in step.busy.items():
        busy.add_row(name, f"{share:.0%}", bar(3 * share))
    console.print(busy)
    memory_of = capacity.memory_of(job)
    for who, parts in (("server", memory_of.server), ("worker", memory_of.worker)):
        listed = ", ".join(f"{name} {human_bytes(nbytes)}" for name, nbytes in parts.items() if nbytes)
        console.print(
            f"memory of a {who}, beyond an idle process: {human_bytes(sum(parts.values()))} ({listed})", highlight=False
        )
    console.print(
        f"processor a step: {step.worker_cpu:.3f} s a worker beside computing, {step.server_cpu:.3f} s all servers; "
        f"{human_bytes(round(2 * step.worker_bytes))} a worker, both ways",
        highlight=False,
    )
