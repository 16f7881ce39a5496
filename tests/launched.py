"""Whole runs through the command line, with real processes: what is printed, how it ends, what it leaves."""

import json
import os
import subprocess
import sys
import textwrap
import time

__all__ = ["events", "launch"]

HEAD = """
import os, torch
from torch import nn
from ps_accordion.worker import DistributedModel, connect
torch.set_num_threads(1)
rank = int(os.environ["PS_ACCORDION_RANK"])
"""
ENDS_WITHIN = 60
"""Seconds from start to end, imports included, on a machine that is busy with something else."""


def launch(tmp_path, script, *flags, command=(sys.executable, "train.py"), largest_file=None):
    """Run a script as two workers, where no file may be larger than that many KiB; return (exit code, everything printed)."""
    (tmp_path / "train.py").write_text(HEAD + textwrap.dedent(script))
    argv = [sys.executable, "-P", "-m", "ps_accordion.launcher", "launch", "--workers", "2", "--servers", "1"]
    argv += ["--run-directory", str(tmp_path / "run"), "--progress", "none", *flags, "--", *command]
    if largest_file is not None:
        argv = ["bash", "-c", f'ulimit -f {largest_file}; exec "$@"', "bash", *argv]
    began = time.monotonic()
    done = subprocess.run(
        argv, cwd=tmp_path, capture_output=True, text=True, timeout=ENDS_WITHIN + 30, env=os.environ, check=False
    )
    assert time.monotonic() - began < ENDS_WITHIN
    return done.returncode, done.stdout + done.stderr


def events(tmp_path, role):
    """Return the events of one role."""
    return [json.loads(line) for line in (tmp_path / "run" / f"events-{role}.jsonl").read_text().splitlines()]
