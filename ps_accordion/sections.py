"""Sections: frozen structs of settings that refuse a value that is not legal, and know which values they were given.

The kinds are msgspec's: a type, a Literal, or `Annotated[int, Meta(ge=1)]`.
They hold for a section that is made by a call, too: msgspec itself checks only what it converts.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, Self, dataclass_transform, get_args, get_origin

import msgspec
from msgspec.structs import fields

from .errors import ConfigError

__all__ = ["IllegalValue", "Section", "Written", "explicit", "flatten", "kinds"]


class Written(ABC):
    """A value that is more than a number or a word: it reads what stands in a file, or its own text, and `str` is that text."""

    @classmethod
    @abstractmethod
    def read(cls, value: Any) -> Self:
        """Return the value that something from a file, a variable or a peer stands for, or the value itself.

        Raises:
            ValueError: It stands for none; the message says what was expected and what came.
        """


class IllegalValue(ConfigError):
    """A value is not legal.

    Attributes:
        name: The setting's name within its section.
    """

    def __init__(self, section: Any, name: str, value: Any, why: str = "") -> None:
        expected, default = _expected(kinds(section)[name]), getattr(section(), name)
        said = f"{name}: {why}" if why else f"{name} = {value!r} is not legal: expected {expected}"
        super().__init__(f"{said}; correct it, or leave it out for {default!r}")
        self.name = name


@dataclass_transform(kw_only_default=True, frozen_default=True)
class _SectionType(msgspec.StructMeta):
    def __call__(cls, **values: Any) -> Any:
        legal = {}
        for name, value in values.items():
            try:
                legal[name] = _legal(value, kinds(cls).get(name))
            except msgspec.ValidationError:
                raise IllegalValue(cls, name, value) from None
            except ValueError as error:  # of a kind that reads its values itself
                raise IllegalValue(cls, name, value, str(error)) from None
        section = super().__call__(**legal)
        vars(section)["given"] = frozenset(values)
        return section


class Section(msgspec.Struct, metaclass=_SectionType, frozen=True, kw_only=True, dict=True):
    """Base of all sections. All fields have defaults.

    Raises:
        IllegalValue: A value is not of its field's kind, outside its bounds, or not finite. Types are strict, but a whole number
            may stand for a float.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        given = {name: getattr(self, name) for name in vars(self).get("given", self.__struct_fields__)}
        return functools.partial(type(self), **given), ()


def flatten(section: Section, prefix: str = "") -> dict[str, Any]:
    """Return every value by dotted name."""
    leaves: dict[str, Any] = {}
    for name in section.__struct_fields__:
        value = getattr(section, name)
        if isinstance(value, Section):
            leaves.update(flatten(value, f"{prefix}{name}."))
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def explicit(section: Section, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the values that were given, even where they are the defaults."""
    # A copy that was made without a call, such as by msgspec.structs.replace, counts as given throughout.
    for name in vars(section).get("given", section.__struct_fields__):
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from explicit(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@functools.cache
def kinds(section: type[Section]) -> dict[str, Any]:
    """Return the kind of every field of a section."""
    return {field.name: field.type for field in fields(section)}


def _legal(value: Any, kind: Any) -> Any:
    if kind is None:  # no such field, as msgspec will say
        return value
    if isinstance(kind, _SectionType):
        if isinstance(value, kind):
            return value
        raise msgspec.ValidationError
    if isinstance(kind, type) and issubclass(kind, Written):
        return kind.read(value)
    legal = msgspec.convert(value, kind)
    if isinstance(legal, float) and not math.isfinite(legal):
        raise msgspec.ValidationError
    return legal


_NOUNS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _expected(kind: Any) -> str:
    """Return a kind in words."""
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    base, *limits = get_args(kind) or (kind,)
    bounds = [
        f"{words} {getattr(limit, bound)}"
        for limit in limits
        for bound, words in _BOUNDS.items()
        if getattr(limit, bound) is not None
    ]
    return " ".join([_NOUNS.get(base, base.__name__), " and ".join(bounds)]).rstrip()
