"""Where a run goes on from."""

from __future__ import annotations

from pathlib import Path

from ps_accordion import checkpoint
from ps_accordion.config import Settings

from .screen import Screen

__all__ = ["resumed"]


def resumed(settings: Settings, path: Path, *, screen: Screen) -> Settings:
    """Return the settings of a run that goes on from a checkpoint, all of which is read before any process starts.

    Args:
        settings: The job.
        path: A checkpoint, or the directory that holds several, of which the newest whole one counts.
        screen: Gets what it goes on from, and why not from a newer one.

    Raises:
        ConfigError: There is none, or it was made under terms that change numbers.
        StorageError: It is damaged, and so are all others there.
    """
    found, said = checkpoint.find(path.absolute())
    for line in said:
        screen.say(line)
    manifest = checkpoint.read(found)
    if not settings.layout.partition_elements:  # a job that goes on keeps the keys that it had, wherever it runs now
        kept = {"layout.partition_elements": manifest.terms.get("layout.partition_elements", 0)}
        settings = settings.replaced(kept, source=f"checkpoint {str(found)!r}")
    manifest.refuse_other_terms(settings.terms(), where=found)
    manifest.refuse_other_workers(settings.workers.count, where=found)
    screen.say(f"going on from {found}: step {manifest.step}, {manifest.nbytes / 1e6:.1f} MB")
    values = {"checkpoint.resume": str(found)}
    if not settings.checkpoint.directory:
        values["checkpoint.directory"] = str(found.parent)
    return settings.replaced(values, source="--resume")
