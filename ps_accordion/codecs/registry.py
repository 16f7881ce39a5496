"""Codecs by name, and what compression is worth: when to send dense, and which of several levels is the lightest."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from ..errors import CodecError
from . import plugins
from .base import Codec
from .bf16 import BF16
from .dense import Dense
from .dgc import DGC
from .eden import Eden
from .int import Int
from .natural import Natural
from .onebit import OneBit
from .powersgd import PowerSgd
from .qsgd import Qsgd
from .quic_fl import QuicFL
from .random_block import RandomBlock
from .random_k import RandomK
from .signsgd import SignSGD
from .terngrad import TernGrad
from .threshold import Threshold
from .topk import TopK

__all__ = ["DEFAULT", "Choice", "Codecs", "Fitted", "effective", "find", "fitted", "get", "lightest", "names", "suite"]

Codecs = Mapping[str, Codec]
Choice = tuple[str, float]
"""A codec's name and a level."""

_CLASSES: dict[str, type[Codec]] = {
    codec.name: codec
    for codec in (
        *(BF16, Dense, DGC, Eden, Int, Natural, OneBit, PowerSgd, Qsgd, QuicFL, RandomBlock, RandomK, SignSGD, TernGrad),
        *(Threshold, TopK),
    )
}


def names() -> list[str]:
    """Return the names of all codecs, those that other distributions declare among them, sorted."""
    return sorted({*_CLASSES, *plugins.declared(plugins.CODECS, ours=_CLASSES)})


def get(name: str, **options: Any) -> Codec:
    """Return the codec called `name`, with the options given.

    Raises:
        CodecError: There is no such codec or option, or the option's value is not legal.
    """
    codec = _class_of(name)
    known = _options(codec)
    for option in options:
        if option not in known:
            raise CodecError(
                f"codec {name}: expected options among {', '.join(known) or '(none)'}, got {option!r}{_nearest(option, known)}"
            )
    return codec(**options)


def suite(*others: str, **options: Any) -> Codecs:
    """Return every codec by name. Each takes those of the options that it has.

    Args:
        others: Codecs of other distributions that are to be among them; may name ours, too. What nobody has named here cannot be
            had by a name in a header.
        options: Options by name.

    Raises:
        CodecError: There is no such codec, or none has an option of that name, or its value is not legal.
    """
    classes = _CLASSES | {name: _class_of(name) for name in others}
    known = sorted({option for codec in classes.values() for option in _options(codec)})
    for option in options:
        if option not in known:
            raise CodecError(f"expected codec options among {', '.join(known)}, got {option!r}{_nearest(option, known)}")
    return MappingProxyType(
        {
            name: codec(**{option: value for option, value in options.items() if option in _options(codec)})
            for name, codec in classes.items()
        }
    )


def fitted(codecs: Codecs, rows: int) -> Codecs:
    """Return codecs for keys that are matrices of so many rows, 0 for none; the same ones where that is nothing new."""
    changed = {name: codec.fitted(rows) for name, codec in codecs.items() if codec.scope == "tensor"}
    return codecs if all(changed[name] is codecs[name] for name in changed) else MappingProxyType({**codecs, **changed})


class Fitted:
    """Codecs, fitted once for each number of rows that keys have: every push and every result asks for them.

    Args:
        codecs: Codecs by name.
    """

    def __init__(self, codecs: Codecs) -> None:
        self._codecs = codecs
        self._by_rows: dict[int, Codecs] = {}

    def of(self, rows: int) -> Codecs:
        """Return the codecs for keys that are matrices of so many rows, 0 for none."""
        codecs = self._by_rows.get(rows)
        if codecs is None:
            codecs = self._by_rows[rows] = fitted(self._codecs, rows)
        return codecs


def effective(codec: str, level: float, elements: int, *, codecs: Codecs | None = None, dense_level: int = 16) -> Choice:
    """Return what to send for a plan's choice: the choice itself, or dense where dense is no larger.

    Args:
        codec: Name of the codec that the plan asks for.
        level: Level that the plan asks for.
        elements: Length of the key.
        codecs: Codecs by name; None takes those without options.
        dense_level: Bits of the dense format that compression must beat.
    """
    known = DEFAULT if codecs is None else codecs
    chosen = find(known, codec)
    chosen.check_level(level)
    dense = known[Dense.name]
    if codec != Dense.name and chosen.payload_bound(elements, level) >= dense.payload_bound(elements, dense_level):
        return Dense.name, float(dense_level)
    return codec, float(level)


def lightest(choices: Iterable[Choice], elements: int, *, codecs: Codecs | None = None) -> Choice:
    """Return the choice with the largest payload, which is the lightest compression.

    Ties go to the name that sorts first, then to the lighter level of that codec (mostly the larger), so that the order of the
    choices does not matter.
    """
    known = DEFAULT if codecs is None else codecs

    def heaviness(choice: Choice) -> tuple[int, str, float]:
        codec = find(known, choice[0])
        return -codec.payload_bound(elements, choice[1]), choice[0], -codec.lightness(choice[1])

    return min(choices, key=heaviness)


def find(codecs: Codecs, name: str) -> Codec:
    """Return the codec called `name` among those of this process."""
    codec = codecs.get(name)
    if codec is None:
        raise CodecError(f"expected a codec among {', '.join(sorted(codecs))}, got {name!r}{_nearest(name, sorted(codecs))}")
    return codec


def _class_of(name: str) -> type[Codec]:
    codec = _CLASSES.get(name) or plugins.load(plugins.CODECS, name, Codec, ours=_CLASSES)
    if codec is None:
        near = _nearest(name, names()) or "; one of another distribution must be installed wherever a process of the job runs"
        raise CodecError(f"expected a codec among {', '.join(names())}, got {name!r}{near}")
    return codec


@functools.cache
def _options(codec: type[Codec]) -> list[str]:
    return [field.name for field in dataclasses.fields(codec) if not field.metadata]


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


DEFAULT: Codecs = suite()
"""Every codec of ours by name, without options: enough to decode any payload, because payloads say how they are written."""
