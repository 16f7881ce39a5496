"""Coefficients that a plan is made with: read from files that `ps-accordion bench` has written, or measured now."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ps_accordion.capacity import Costs, Job, Link, Spent, costs_from, works_of
from ps_accordion.codecs import suite, warm
from ps_accordion.compression import CodecSettings
from ps_accordion.config import LARGEST_KEY
from ps_accordion.errors import ConfigError, PsAccordionError
from ps_accordion.layout import Tensor
from ps_accordion.regimes.base import Choice

from . import codec_speed
from .job_speed import Case, pushpull_rows
from .job_speed import Job as BenchJob
from .machine import machine

__all__ = ["Bench", "costs_now", "read_benches"]

Row = dict[str, Any]

UNIT = LARGEST_KEY
"""Elements that codecs are measured with: a whole partition, the real unit of work."""
CALIBRATION = (Case("topk", 0.01), Case("dense", 32.0))
"""What is pushed to find out what messages and bytes cost: few bytes, and many."""
BENCH = BenchJob(workers=2, servers=2, shards_per_server=1, link="tcp", turns=9, elements=1 << 24)
SMALL = Choice("dense", float(CodecSettings().small_bits))
"""How small tensors go, of which every model has some."""


class Bench(NamedTuple):
    """What one bench has measured.

    Attributes:
        source: Its file, or what was done, for people.
        cores: Of the machine that it ran on.
        rows: As its JSON has them.
    """

    source: str
    cores: int
    rows: list[Row]


def read_benches(files: Iterable[Path]) -> list[Bench]:
    """Return what files of `bench codecs --json` and `bench pushpull --json` hold.

    Raises:
        ConfigError: One does not exist, or is no such file.
    """
    return [_read(file) for file in files]


def costs_now(choices: Iterable[Choice], benches: Sequence[Bench], *, told: Callable[[str], object]) -> tuple[Costs, list[Bench]]:
    """Return the costs of a job, from benches and, as far as they lack something, measured now.

    Args:
        choices: Codecs and levels of the job.
        benches: What was measured before.
        told: Called with what is done, for people.

    Returns:
        The costs, and all benches; the last one is what was measured now.

    Raises:
        ConfigError: A bench is malformed.
        PsAccordionError: What was to be measured has failed.
    """
    for bench in benches:
        told(f"coefficients: {bench.source}, {len(bench.rows)} rows")
    now = Bench("measured now", machine()["cores"], [])
    if len(_pushed(benches)) < 2:
        cases = ", ".join(f"{case.codec}:{case.level:g}" for case in CALIBRATION)
        told(f"measuring now what messages and bytes cost: push_pull of {cases}")
        counted = pushpull_rows(CALIBRATION, BENCH)
        if isinstance(counted, int):
            raise PsAccordionError(f"push_pull ended with exit code {counted} while it was measured; its output stands above")
        now.rows.extend(counted)
    works, copy = works_of((row for bench in benches for row in bench.rows), source="--coefficients")
    every = [*benches, now]
    wanted = {*choices, SMALL, *(Choice(str(row["codec"]), float(row["level"])) for _, row in _pushed(every))}
    if missing := sorted(wanted - works.keys()):
        told("measuring now what these cost: " + ", ".join(f"{choice.codec}:{choice.level:g}" for choice in missing))
        rows = _measured(missing)
        now.rows.extend(rows)
        measured, copied = works_of(rows, source=now.source)
        works, copy = works | measured, copy or copied
    costs = costs_from(works, copy, [_spent(row, bench) for bench, row in _pushed(every)])
    for who, (task, *carries) in (("worker", costs.worker), ("server", costs.server)):
        message, byte = (1e6 * sum(values) for values in zip(*carries, strict=True))
        each = f"{1e6 * task:.0f} us a key, {message:.0f} us a message, {(1 << 20) * byte:.0f} us a MiB"
        told(f"beside kernels a {who} spends {each}")
    return costs, every


def _read(file: Path) -> Bench:
    form = "a file that `ps-accordion bench codecs --json FILE` or `bench pushpull --json FILE` has written"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        cores, rows = content["machine"]["cores"], content["rows"]
    except OSError as error:
        raise ConfigError(f"--coefficients {str(file)!r}: {error.strerror}; expected {form}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--coefficients {str(file)!r}: expected {form}; write it anew") from None
    if not isinstance(cores, int) or cores < 1 or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"--coefficients {str(file)!r}: expected {form}; write it anew")
    return Bench(str(file), cores, rows)


def _measured(choices: Iterable[Choice]) -> list[Row]:
    """Measure codecs as `bench codecs` does, some seconds each."""
    cases = [codec_speed.Case(*choice) for choice in choices]
    known = suite()
    warm((known[case.codec], case.level) for case in cases)
    return [codec_speed.measure_copy(), *(row for case in cases for row in codec_speed.measure(case, UNIT))]


def _pushed(benches: Sequence[Bench]) -> list[tuple[Bench, Row]]:
    """Return the rows of `bench pushpull` with the fewest and the most bytes: all that costs follow from.

    Not those whose bytes went by a lane, where they cost nothing: machines of a network have none.
    """
    rows = [(bench, row) for bench in benches for row in bench.rows if row.get("baseline") == "gloo all_reduce"]
    rows = [(bench, row) for bench, row in rows if not row.get("lane_bytes_a_worker")]
    try:
        rows.sort(key=lambda one: float(one[1]["bytes_a_worker"]) / int(one[1]["elements"]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        files = ", ".join({bench.source for bench, _ in rows})
        raise ConfigError(f"{files}: expected rows as bench pushpull --json writes them; write the file anew") from None
    return [rows[0], rows[-1]] if len(rows) > 1 else rows


def _spent(row: Row, bench: Bench) -> Spent:
    """Return the round of `bench pushpull`: all processes on one machine, one tensor, and no computing."""
    memory = Link(float("inf"))
    try:
        job = Job(
            tensors=(Tensor("bench", (1, int(row["elements"])), "float32"),),
            choice=Choice(str(row["codec"]), float(row["level"])),
            workers=int(row["workers"]),
            servers=int(row["servers"]),
            shards_per_server=int(row["shards_per_server"]),
            worker_link=memory,
            server_link=memory,
            worker_cores=bench.cores,
            server_cores=bench.cores,
            threads=1,
            bucketed=False,
            partition_elements=int(row.get("partition_elements", 1 << 19)),  # as it was before rows said so
        )
        return Spent(job, {str(kind): float(ms) / 1e3 for kind, ms in row["cpu_ms"].items()})
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ConfigError(f"{bench.source}: expected rows as bench pushpull --json writes them; write the file anew") from None
