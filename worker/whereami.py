"""Which worker this process is, from whoever started it.

Launchers say it in different variables; this is the only place that knows their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ps_accordion.errors import ConfigError

__all__ = ["Place", "place"]


class Place(NamedTuple):
    """Where a process stands.

    Attributes:
        rank: Rank of this worker in the run; -1 when nobody said.
        world_size: Processes that take part; 0 when nobody said.
        local_size: Those of them on this machine; 1 when nobody said.
        source: Who said so, for messages.
    """

    rank: int
    world_size: int
    local_size: int
    source: str


FAMILIES = (
    ("ps-accordion", "PS_ACCORDION_RANK", "PS_ACCORDION_WORLD_SIZE", "PS_ACCORDION_LOCAL_WORLD_SIZE"),
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"),
    ("DMLC", "DMLC_WORKER_ID", "DMLC_NUM_WORKER", "BYTEPS_LOCAL_SIZE"),
)
"""(who, variables of the rank, of the number of processes, and of those on this machine), the first that is set wins."""


def place(environment: Mapping[str, str]) -> Place:
    """Return where this process stands.

    Raises:
        ConfigError: A variable is set to something that is no number.
    """
    for source, rank, size, local in FAMILIES:
        if environment.get(rank):
            local_size = max(1, _number(environment, local, 1))
            return Place(_number(environment, rank, 0), _number(environment, size, 0), local_size, source)
    return Place(-1, 0, 1, "nobody")


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    # Slurm writes "4(x2)" for four tasks on each of two nodes.
    digits = text.partition("(")[0]
    if not digits.isdecimal():
        raise ConfigError(f"expected a number in {name}, got {text!r}; unset it or correct it")
    return int(digits)
