"""Runs rows of the table with real processes: two under gloo, two under `ps-accordion launch` with two servers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

__all__ = ["Run", "start_ours", "start_theirs"]

TESTS = Path(__file__).resolve().parents[1]
RANKS = 2
SECONDS = 240
"""Several times what it takes on a busy machine; reached only when something hangs."""
DENSE = ("--codec", "dense", "--light", "32", "--policy", "static")
FOREIGN = ("PS_ACCORDION_", "DMLC_", "BYTEPS_", "SLURM_", "OMPI_", "PMI_", "TORCHELASTIC_", "MASTER_")
"""Variables of a surrounding run; RANK and WORLD_SIZE are set here."""


class Run:
    """Processes that run rows into a folder.

    Args:
        folder: Where they leave their notes.
        processes: What has been started, each with its output in a file of the folder.
    """

    def __init__(self, folder: Path, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self._folder = folder
        self._processes = processes

    def wait(self) -> None:
        """Wait until all processes have ended."""
        for process in self._processes:
            process.wait(SECONDS)

    @property
    def codes(self) -> list[int | None]:
        """Exit codes."""
        return [process.returncode for process in self._processes]

    def notes(self, row: str, part: str = ".") -> list[dict[str, Tensor]]:
        """Return what a row has noted, by rank."""
        files = [self._folder / part / f"{row}-{rank}.safetensors" for rank in range(RANKS)]
        assert all(file.exists() for file in files), f"not run: {row!r}\n{self.trouble()}"
        return [load_file(file) for file in files]

    def trouble(self) -> str:
        """Return why the run ended before its last row, as far as it said."""
        said = [f"{file.name}\n{file.read_text()}" for file in sorted(self._folder.rglob("failed-*"))]
        said += [f"{file.name}, its end\n{file.read_text()[-3000:]}" for file in sorted(self._folder.glob("*.log"))]
        return "\n".join(said)

    def end(self) -> None:
        """Kill what still runs."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def start_theirs(folder: Path, rows: Sequence[str] = ()) -> Iterator[Run]:
    """Run rows (or all) under DistributedDataParallel."""
    folder.mkdir()
    command = [sys.executable, "-m", "behaviour.run", "ddp", str(folder), *rows]
    places = [{"RANK": str(rank), "WORLD_SIZE": str(RANKS)} for rank in range(RANKS)]
    run = Run(folder, [_start(command, folder, f"rank-{place['RANK']}.log", place) for place in places])
    try:
        yield run
    finally:
        run.end()


@contextmanager
def start_ours(folder: Path, rows: Sequence[str] = (), codec: Sequence[str] = DENSE) -> Iterator[Run]:
    """Run rows (or all) under ps-accordion; small partitions, so that tensors have several and both servers have work."""
    folder.mkdir()
    command = [sys.executable, "-P", "-m", "ps_accordion.launcher", "launch", "--workers", str(RANKS), "--servers", "2", *codec]
    command += ["--set", "layout.partition_elements=1024", "--run-directory", str(folder / "run"), "--progress", "none"]
    command += ["--", "python", "-m", "behaviour.run", "ours", str(folder), *rows]
    run = Run(folder, [_start(command, folder, "launch.log", {})])
    try:
        yield run
    finally:
        run.end()


def _start(command: list[str], folder: Path, log: str, place: dict[str, str]) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)} | place
    # torch leaves caches in the temporary directory.
    environment |= {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    with (folder / log).open("wb") as output:
        return subprocess.Popen(
            command, cwd=TESTS, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
