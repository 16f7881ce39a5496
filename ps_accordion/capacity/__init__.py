"""What a job would take before it runs: step time, processor time, memory, and how many servers it wants.

`job.py` says what a job is, `costs.py` what its work costs, from what `ps-accordion bench` has measured; `step.py` lets one step
pass in a discrete-event simulation of all its threads and links (`events.py`), and `search.py` looks for the number of servers.
Nothing here has a clock, a thread or a socket: the same job and costs give the same figures everywhere.
"""

from __future__ import annotations

from .costs import Carry, Costs, Handling, Work, works_of
from .job import Compute, Job, Link
from .memory import Memory, memory_of
from .models import MODELS, of_parameters, read_table
from .search import NEARLY, Candidate, candidates, recommended
from .spent import Spent, costs_from
from .step import Step, simulate
from .units import bits_per_second, bits_text, seconds

__all__ = [
    "MODELS",
    "NEARLY",
    "Candidate",
    "Carry",
    "Compute",
    "Costs",
    "Handling",
    "Job",
    "Link",
    "Memory",
    "Spent",
    "Step",
    "Work",
    "bits_per_second",
    "bits_text",
    "candidates",
    "costs_from",
    "memory_of",
    "of_parameters",
    "read_table",
    "recommended",
    "seconds",
    "simulate",
    "works_of",
]
