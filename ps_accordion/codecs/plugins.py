"""Codecs of other distributions: classes that they declare as entry points, found when a job names one.

    [project.entry-points."ps_accordion.codecs"]
    peaks = "peaks:Peaks"                        the codec: a class on `base.Codec`, whose `name` is the entry point's

    [project.entry-points."ps_accordion.device_codecs"]
    peaks = "peaks_on_device:PeaksTwin"          its form for accelerators, on `device.DeviceCodec`; may be left out

Nothing is imported but what is asked for by name, so a distribution that is broken does not touch jobs that do without it.
Names of ours cannot be taken: a distribution that declares one is refused as soon as anything is looked for here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import CodecError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["CODECS", "MAX_NAME", "TWINS", "declared", "load"]

CODECS = "ps_accordion.codecs"
TWINS = "ps_accordion.device_codecs"
MAX_NAME = 64
"""Bytes of a codec's name: it stands in every header and in plans."""


def declared(group: str, *, ours: Collection[str]) -> Mapping[str, EntryPoint]:
    """Return the entry points of a group by name; nothing is imported.

    Args:
        group: `CODECS` or `TWINS`.
        ours: Names that no distribution may have.

    Raises:
        CodecError: A name is one of ours, is declared by two distributions, or is none that a header can carry.
    """
    points: dict[str, EntryPoint] = {}
    for point in _points(group):
        if point.name in ours or point.name in points:
            other = _owner(points[point.name]) if point.name in points else "ps-accordion itself"
            raise CodecError(
                f"the name {point.name!r} in entry point group {group} is declared by {_owner(point)}, and by {other}; expected "
                "a name of its own: rename the codec, or uninstall one of the two"
            )
        if not 0 < len(point.name.encode()) <= MAX_NAME or not point.name.isprintable():
            raise CodecError(
                f"{_owner(point)} declares {point.name!r} in entry point group {group}; expected a name of 1 to {MAX_NAME} bytes"
            )
        points[point.name] = point
    return points


def load(group: str, name: str, kind: type, *, ours: Collection[str]) -> type[Any] | None:
    """Return the class that a distribution declares under a name; None where none does.

    Raises:
        CodecError: It cannot be imported, is no complete subclass of `kind`, or has another name; the distribution is named.
    """
    point = declared(group, ours=ours).get(name)
    if point is None:
        return None
    where = f"codec {name!r} of {_owner(point)} ({group}: {point.value})"
    try:
        found = point.load()
    except Exception as error:  # whatever a module of somebody else does when it is imported
        raise CodecError(f"{where} cannot be loaded: {type(error).__name__}: {error}; repair or uninstall it") from error
    if not isinstance(found, type) or not issubclass(found, kind):
        raise CodecError(f"{where}: expected a class on {kind.__module__}.{kind.__name__}, got {found!r}")
    if inspect.isabstract(found):
        missing = ", ".join(name for name, member in inspect.getmembers(found) if getattr(member, "__isabstractmethod__", False))
        raise CodecError(f"{where}: expected all methods of {kind.__module__}.{kind.__name__}, {missing} are missing")
    if getattr(found, "name", None) != name:
        raise CodecError(f"{where}: expected a class whose name is {name!r}, got {getattr(found, 'name', None)!r}")
    return found


@functools.cache
def _points(group: str) -> tuple[EntryPoint, ...]:
    from importlib import metadata  # slow to import, and only jobs with such a codec need it

    return tuple(metadata.entry_points(group=group))


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "a distribution without a name"
