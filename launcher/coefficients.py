"""Coefficients that a plan is made with: read from files that `ps-accordion bench` has written, or measured now."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ps_accordion.capacity import Costs, Job, Link, Observed, Work, fitted
from ps_accordion.codecs import suite, warm
from ps_accordion.config import LayoutSettings
from ps_accordion.errors import ConfigError
from ps_accordion.layout import Tensor
from ps_accordion.regimes.base import Choice

from .codec_speed import Case, measure

__all__ = ["Bench", "costs_of", "measure_works", "read_benches"]

Row = dict[str, Any]

UNIT = LayoutSettings().partition_elements
"""Elements that codecs are measured with: a whole partition, the real unit of work."""
MOST_THREADS = 4
"""Codec threads that a worker takes at most where it is not told (`worker/compute.py`)."""


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


def measure_works(choices: Iterable[Choice], *, told: Callable[[Choice], object]) -> list[Row]:
    """Measure codecs as `bench codecs` does, some seconds each; `told` is called before each."""
    cases = [Case(choice.codec, choice.level) for choice in choices]
    known, rows = suite(), []
    warm((known[case.codec], case.level) for case in cases)
    for case in cases:
        told(Choice(*case))
        rows += list(measure(case, UNIT))
    return rows


def costs_of(works: dict[Choice, Work], copy: float, benches: Sequence[Bench]) -> Costs:
    """Return the costs of codecs, with those of messages and bytes that explain what `bench pushpull` has measured.

    Args:
        works: What codecs cost; all those of `pushed`, too.
        copy: Seconds an element of a copy.
        benches: What was measured; its rows of `bench pushpull` count.

    Raises:
        ConfigError: There are no rows of a compressed and of a dense case, or they are malformed.
    """
    return fitted(Costs(works, copy, message=0.0, byte=0.0), [_observed(row, bench) for bench, row in pushed(benches)])


def pushed(benches: Sequence[Bench]) -> list[tuple[Bench, Row]]:
    """Return the rows of `bench pushpull` with the fewest and the most bytes: all that a fit needs."""
    rows = [(bench, row) for bench in benches for row in bench.rows if row.get("baseline") == "gloo all_reduce"]
    try:
        rows.sort(key=lambda one: float(one[1]["bytes_a_worker"]) / int(one[1]["elements"]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        files = ", ".join({bench.source for bench, _ in rows})
        raise ConfigError(f"{files}: expected rows as bench pushpull --json writes them; write the file anew") from None
    return [rows[0], rows[-1]] if len(rows) > 1 else rows


def _observed(row: Row, bench: Bench) -> Observed:
    """Return the round of `bench pushpull`: all processes on one machine, one tensor, and no computing."""
    memory = Link(float("inf"))
    try:
        workers = int(row["workers"])
        job = Job(
            tensors=(Tensor("bench", (1, int(row["elements"])), "float32"),),
            choice=Choice(str(row["codec"]), float(row["level"])),
            workers=workers,
            servers=int(row["servers"]),
            shards_per_server=int(row["shards_per_server"]),
            worker_link=memory,
            server_link=memory,
            worker_cores=bench.cores,
            server_cores=bench.cores,
            shared_cores=bench.cores,
            threads=default_threads(bench.cores // workers),
            bucketed=False,
        )
        return Observed(job, float(row["ms"]) / 1e3)
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{bench.source}: expected rows as bench pushpull --json writes them; write the file anew") from None


def default_threads(cores: int) -> int:
    """Return the codec threads of a worker that has so many cores to itself."""
    return max(1, min(MOST_THREADS, cores))
