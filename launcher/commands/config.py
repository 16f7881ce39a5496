"""`ps-accordion config`: all settings as TOML, resolved, each with its documentation."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from itertools import pairwise

from ps_accordion import config
from ps_accordion.config import Settings
from ps_accordion.sections import Section, kinds

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
    sections = {name.rpartition(".")[0] for name in documents}
    lines = []
    section = ""
    for line in config.render(settings).splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
            text = documents[section[:-1]]
            if section[:-1] in sections:  # its first words name it
                text = text.partition(": ")[2]
            lines += [f"# {text[:1].upper()}{text[1:]}", line]
        elif line and section[:-1] in sections | {""}:
            text = documents[section + line.partition(" = ")[0]]
            lines += [f"# {text}", line]
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _documents(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting and section by dotted name with its text, which only the source has: Python drops those of fields."""
    (source,) = ast.parse(inspect.getsource(section)).body
    texts = {}
    for field, text in pairwise(source.body if isinstance(source, ast.ClassDef) else ()):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            texts[ast.unparse(field.target)] = str(text.value.value)
    for name, kind in kinds(section).items():
        if isinstance(kind, type) and issubclass(kind, Section):
            yield prefix + name, " ".join((kind.__doc__ or "").split())
            yield from _documents(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, " ".join(texts[name].split())
