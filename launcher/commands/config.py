"""`ps-accordion config`: all settings as TOML, resolved, each with its documentation."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from ps_accordion import config
from ps_accordion.config import Settings

from ..options import JobOptions

__all__ = ["documented", "show"]


def show(*, job: JobOptions | None = None) -> int:
    """Show all settings, resolved from file, environment and flags, as TOML that --config reads.

    Args:
        job: The job's settings.
    """
    print(documented((job or JobOptions()).settings()), end="")
    return 0


def documented(settings: Settings) -> str:
    """Return the settings as TOML with what each means in a comment above it."""
    documents = dict(_documents(Settings))
    lines = []
    section = ""
    for line in config.render(settings).splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
            text = documents[section[:-1]].partition(": ")[2]
            lines += [f"# {text[:1].upper()}{text[1:]}", line]
        elif line:
            text = documents[section + line.partition(" = ")[0]]
            lines += [f"# {text}", line]
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _documents(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield prefix + name, " ".join((kind.__doc__ or "").split())
            yield from _documents(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, " ".join((field.description or "").split())
