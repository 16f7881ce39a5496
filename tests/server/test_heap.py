"""A server keeps the memory of messages: it is not cleared by the system again for each."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ps_accordion.server.heap import keep_freed_memory

ROUND = """
import resource, sys
import numpy as np
from ps_accordion.server.heap import keep_freed_memory

def faults_of_a_round():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for message in [np.empty(4 << 20, np.uint8) for _ in range(8)]:
        message.fill(1)
    del message
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    print(keep_freed_memory({}))
else:
    print(False)
faults_of_a_round(), faults_of_a_round()
print(faults_of_a_round())
"""


def test_memory_of_messages_is_cleared_once() -> None:
    """Eight messages of 4 MiB a round fault some thousand times where memory goes back to the system, and hardly where not."""
    kept, left = (
        subprocess.run([sys.executable, "-c", ROUND, how], capture_output=True, text=True, check=True, timeout=60).stdout.split()
        for how in ("keep", "leave")
    )
    assert (kept[0], left[0]) == ("True", "False")
    assert int(left[1]) > 4000
    assert int(kept[1]) < 100


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"])
def test_who_says_what_the_library_is_to_do_is_obeyed(name: str) -> None:
    """Nothing is changed then."""
    assert not keep_freed_memory({name: "1"})
