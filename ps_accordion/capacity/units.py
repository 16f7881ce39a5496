"""Rates and times as people write them: `10Gbit`, `100 Mbit/s`, `20ms`."""

from __future__ import annotations

import math
import re

from ..errors import ConfigError

__all__ = ["bits_per_second", "bits_text", "seconds"]

_RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]+)(?:/s)?\s*")


def bits_per_second(text: str, *, source: str) -> float:
    """Return the bits a second of a rate such as `10Gbit`, `100 Mbit/s` or `2.5gbit`; more than 0.

    Args:
        text: The rate; its unit is one of bit, kbit, Mbit, Gbit, Tbit, in any case.
        source: Where it comes from, for the message.

    Raises:
        ConfigError: It is not one.
    """
    found = _WRITTEN.fullmatch(text)
    rate = float(found[1]) * _RATES.get(found[2].lower(), 0.0) if found else 0.0
    if not rate or not math.isfinite(rate):
        byte = " (bits, not bytes: 1 GB/s is 8Gbit)" if re.search(r"[0-9 ][kKmMgGtT]?B", text) else ""
        raise ConfigError(f"{source}: expected a rate such as 10Gbit, 100Mbit or 2.5Gbit/s, got {text!r}{byte}")
    return rate


def seconds(text: str, *, source: str) -> float:
    """Return the seconds of a time such as `20ms`, `1.5s` or `0`.

    Raises:
        ConfigError: It is not one; `source` says where it comes from.
    """
    found = _WRITTEN.fullmatch(text)
    if found and found[2] in _TIMES and "/" not in text:
        return float(found[1]) * _TIMES[found[2]]
    if re.fullmatch(r"\s*0+(?:\.0+)?\s*", text):
        return 0.0
    raise ConfigError(f"{source}: expected a time such as 20ms, 150us or 1.5s, got {text!r}")


def bits_text(rate: float) -> str:
    """Return a rate as people write it: `10 Gbit/s`."""
    for unit, size in (("Tbit/s", 1e12), ("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if rate >= size:
            return f"{rate / size:g} {unit}"
    return f"{rate:g} bit/s"
