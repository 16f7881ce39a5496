"""`ps-accordion launch`: a whole job on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .. import local
from ..checkpoints import resumed
from ..options import JobOptions
from ..screen import ProgressMode, Screen

__all__ = ["launch"]


def launch(
    *command: Annotated[str, Parameter(show=False)],
    job: JobOptions | None = None,
    progress: ProgressMode = "auto",
    resume: Path | None = None,
) -> int:
    """Run a training job on this machine: a coordinator, servers, and your command once a worker.

    The script calls ps_accordion.worker.connect(). Ctrl-C ends all processes. The exit code is that of the first process
    that failed, and its own error is the last thing on the screen.

    Args:
        command: The training command, after --.
        job: The job's settings.
        progress: How to show progress: auto (live on a terminal, else a line every few seconds), line, none.
        resume: Go on from a checkpoint: its folder, or the directory that holds several, of which the newest counts. New ones
            are kept beside it.
    """
    settings = (job or JobOptions()).settings()
    with Screen(progress) as screen:
        if resume is not None:
            settings = resumed(settings, resume, screen=screen)
        return local.run(settings, command, screen=screen).exit_code
