"""Codecs by the name of a tensor: the table `[codec.tensors]`, and which of its rows a tensor has.

    [codec.tensors]
    "*.bias" = "dense"
    "encoder.*" = { codec = "topk", light = 0.1, heavy = 0.01 }

A row is a pattern and a codec, or a codec and its levels; a level that is left out, or 0, is the codec's own.
A pattern matches the whole name, case and all: `*` stands for anything, dots too, `?` for one character, `[ab]` for one of these.
**The first row that matches decides**, in the order in which they stand in the file; where none does, `[codec]` does.

As a term of the job, in the environment and as a flag the table is text, in which rows have an order to be compared by: an inline
table of TOML, `{"*.bias" = "dense"}`.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Self

from .errors import ConfigError
from .sections import Written

__all__ = ["MAX_TEXT", "TensorCodec", "TensorCodecs"]

MAX_TEXT = 2000
"""Characters of the whole table: it travels as one term when a process joins."""
_LEVELS = ("light", "heavy")
_EXAMPLE = '"encoder.*" = "topk", or "encoder.*" = { codec = "topk", light = 0.1, heavy = 0.01 }'


class TensorCodec(NamedTuple):
    """What a tensor is compressed with.

    Attributes:
        codec: Name of the codec.
        light: Its level in critical regimes, and whenever in doubt; 0 for the codec's own.
        heavy: Its level elsewhere; 0 for the codec's own.
        pattern: The names that have it.
    """

    codec: str
    light: float
    heavy: float
    pattern: str = "*"


@dataclass(frozen=True)
class TensorCodecs(Written):
    """The table: its rows, in order."""

    rows: tuple[TensorCodec, ...] = ()

    def of(self, name: str) -> TensorCodec | None:
        """Return the first row that matches the name of a tensor; None where none does."""
        return next((row for row in self.rows if fnmatchcase(name, row.pattern)), None)

    def filled(self, levels: Mapping[str, tuple[float, float]]) -> TensorCodecs:
        """Return the table with these light and heavy levels, by codec, where it has none.

        Raises:
            ConfigError: It is too long then.
        """
        table = TensorCodecs(tuple(_filled(row, *levels.get(row.codec, (0.0, 0.0))) for row in self.rows))
        if len(str(table)) > MAX_TEXT:
            raise ConfigError(
                f"codec.tensors has {len(str(table))} characters as text; expected at most {MAX_TEXT}, because it travels as one "
                "term: say more with fewer patterns, with * and ?"
            )
        return table

    @classmethod
    def read(cls, value: Any) -> Self:
        """Return the table that a TOML table, or its text, stands for.

        Raises:
            ValueError: It is none; the message says what was expected and what came.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = _parsed(value)
        if not isinstance(value, dict):
            raise ValueError(f"expected a table of patterns, such as {_EXAMPLE}; got {value!r}")
        return cls(tuple(_row(pattern, row) for pattern, row in value.items()))

    def toml(self) -> Iterator[str]:
        """Yield a line of TOML a row."""
        for row in self.rows:
            yield f"{_quoted(row.pattern)} = {{codec = {_quoted(row.codec)}, light = {row.light!r}, heavy = {row.heavy!r}}}"

    def __str__(self) -> str:
        """Return the table as an inline table of TOML, which `read` reads back."""
        return f"{{{', '.join(self.toml())}}}"

    def __repr__(self) -> str:
        return str(self)


def _filled(row: TensorCodec, light: float, heavy: float) -> TensorCodec:
    return row._replace(light=row.light or light, heavy=row.heavy or heavy)


def _parsed(text: str) -> Any:
    try:
        found = tomllib.loads(f"table = {text.strip() or '{}'}")
    except tomllib.TOMLDecodeError:
        raise ValueError(f"expected an inline table of TOML, such as {{{_EXAMPLE.partition(',')[0]}}}; got {text!r}") from None
    if len(found) != 1:
        raise ValueError(f"expected one inline table of TOML and nothing behind it, got {text!r}")
    return found["table"]


def _row(pattern: str, row: Any) -> TensorCodec:
    if not pattern or not pattern.isprintable():
        raise ValueError(f"expected patterns of printable characters, such as {_EXAMPLE}; got {pattern!r}")
    if isinstance(row, str):
        row = {"codec": row}
    if not isinstance(row, dict):
        raise ValueError(f"{pattern!r}: expected a codec, or a codec and its levels, such as {_EXAMPLE}; got {row!r}")
    if unknown := sorted(row.keys() - {"codec", *_LEVELS}):
        raise ValueError(f"{pattern!r}: expected codec, light and heavy, got {unknown[0]!r}; other options are the whole job's")
    codec = row.get("codec")
    if not isinstance(codec, str) or not codec or not codec.isprintable():
        raise ValueError(f"{pattern!r}: expected the name of a codec, such as {_EXAMPLE}; got {codec!r}")
    light, heavy = (_level(pattern, name, row.get(name, 0.0)) for name in _LEVELS)
    return TensorCodec(codec, light, heavy, pattern)


def _level(pattern: str, name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{pattern!r}: expected {name} to be a finite number at least 0, got {value!r}")
    return float(value)


def _quoted(text: str) -> str:
    """Return printable text as a string of TOML, which escapes what JSON escapes."""
    return json.dumps(text, ensure_ascii=False)
