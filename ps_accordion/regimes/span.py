"""How long a window is: "N steps" or "N epochs", as the configuration writes it."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from ..errors import ConfigError

__all__ = ["MAX_COUNT", "Span", "parse_span"]

MAX_COUNT = 1_000_000_000
"""No training has windows this long; a larger number is a slip."""


class Span(NamedTuple):
    """A length in steps (rounds) or in epochs.

    Attributes:
        length: How many, at least 1.
        unit: What is counted.
    """

    length: int
    unit: Literal["step", "epoch"]

    def __str__(self) -> str:
        """Return the span as the configuration writes it."""
        return f"{self.length} {self.unit}{'s' if self.length > 1 else ''}"


_PATTERN = re.compile(r"\s*([0-9]{1,10})\s+(step|epoch)s?\s*", re.ASCII)


def parse_span(text: str) -> Span:
    """Read a span from a setting such as `100 steps` or `1 epoch`.

    Raises:
        ConfigError: The text is neither, or the number is not from 1 to `MAX_COUNT`.
    """
    match = _PATTERN.fullmatch(text)
    count = int(match[1]) if match else 0
    if match is None or not 1 <= count <= MAX_COUNT:
        raise ConfigError(
            f'regime.window = {text!r} is not legal: expected "N steps" or "N epochs" with N from 1 to {MAX_COUNT}, '
            'such as "100 steps" or "1 epoch"'
        )
    return Span(count, "step" if match[2] == "step" else "epoch")
