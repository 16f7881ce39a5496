"""Crash points: a process dies where the environment says, and nowhere else."""

import os
import signal
import subprocess
import sys

import pytest

SCRIPT = """
from ps_accordion.crashpoints import reach
for number in range(4):
    reach("a")
    print(number, flush=True)
    reach("b")
"""


@pytest.mark.parametrize(
    ("environment", "printed"),
    [
        ({}, 4),
        ({"PS_ACCORDION_CRASH_AT": "a"}, 0),
        ({"PS_ACCORDION_CRASH_AT": "b"}, 1),
        ({"PS_ACCORDION_CRASH_AT": "a:3"}, 2),
        ({"PS_ACCORDION_CRASH_AT": "c"}, 4),
        ({"PS_ACCORDION_CRASH_AT": "a", "PS_ACCORDION_RESTART": "1"}, 4),
    ],
)
def test_a_process_dies_at_its_point(environment, printed):
    """The first time it comes there, or the n-th; not in a later life."""
    argv = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(argv, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=False)
    assert done.stdout.split() == [str(number) for number in range(printed)]
    assert done.returncode == (0 if printed == 4 else -signal.SIGKILL)
