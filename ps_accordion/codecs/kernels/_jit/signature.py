"""What a kernel takes and returns, in words that need no numba.

A signature reads as numba writes it: `int32(F32_IN, float32)`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

__all__ = [
    "F32",
    "F32_IN",
    "F64",
    "I32",
    "U8",
    "U8_IN",
    "U16",
    "U16_IN",
    "U32",
    "U32_IN",
    "Argument",
    "Scalar",
    "Signature",
    "Vector",
    "boolean",
    "float32",
    "float64",
    "int32",
    "int64",
    "void",
]


class Scalar(NamedTuple):
    """A number, by the name that numpy and numba have for it; called with arguments it makes the signature that returns it."""

    name: str

    def __call__(self, *arguments: Argument) -> Signature:
        """Return the signature of a kernel that takes `arguments` and returns this."""
        return Signature(self, arguments)

    def __str__(self) -> str:
        return self.name


class Vector(NamedTuple):
    """A C-contiguous array of one dimension in the host's byte order.

    One that is `writable` must be aligned too; one that is not is only read, and may be read-only and at any address.
    """

    element: str
    writable: bool

    def __str__(self) -> str:
        return f"{'writable ' if self.writable else ''}{self.element}[n]"


Argument: TypeAlias = Scalar | Vector


class Signature(NamedTuple):
    """What a kernel returns, and what it takes."""

    returns: Scalar
    arguments: tuple[Argument, ...]

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.arguments))}) -> {self.returns}"


void = Scalar("void")
boolean = Scalar("boolean")
int32 = Scalar("int32")
int64 = Scalar("int64")
float32 = Scalar("float32")
float64 = Scalar("float64")

F32 = Vector("float32", writable=True)
F64 = Vector("float64", writable=True)
I32 = Vector("int32", writable=True)
U8 = Vector("uint8", writable=True)
U16 = Vector("uint16", writable=True)
U32 = Vector("uint32", writable=True)
F32_IN = Vector("float32", writable=False)
U8_IN = Vector("uint8", writable=False)
U16_IN = Vector("uint16", writable=False)
U32_IN = Vector("uint32", writable=False)
