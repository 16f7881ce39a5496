"""Which codec and which levels every tensor of a layout has: what `[codec]` and its table `tensors` come to.

Everybody asks here: the coordinator, whose policies choose between the two levels of each tensor; workers, for what they push
where no plan holds; servers, for the room that a payload may take.

* **Compressible tensors** have the codec and levels of the first row of `codec.tensors` that matches their name, else those of
  `[codec]`. Those whose codec needs them whole are matrices to the layout (`matrices`).
* **Small tensors** go dense, fused with others, whatever their row says, at `codec.small_bits`; but at 32 bits where the row of
  one of the tensors in the key, or `[codec]`, is dense at 32: a key is as exact as the most exact of its tensors.
* **Buffers** are always exact.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence

from .codecs import Codec, Codecs, registry
from .compression import LEVELS, CodecSettings
from .config import Settings
from .errors import CodecError, ConfigError
from .layout import Key, Layout, Matrices, Tensor
from .patterns import TensorCodec
from .regimes.base import Choice
from .regimes.plan import MAX_PALETTE

__all__ = ["EXACT", "Selection", "check", "codecs_of", "lay_out", "levels_of", "matrices", "momenta", "unmatched", "used"]

EXACT = Choice("dense", 32.0)


class Selection:
    """Codec and levels of every tensor of a layout.

    Args:
        settings: `[codec]` of the job.
        layout: The layout.

    Attributes:
        light: One choice a row of the table, for critical regimes and whenever in doubt. (Nobody asks for that of buffers.)
        heavy: One choice a row, for the other regimes.
    """

    def __init__(self, settings: CodecSettings, layout: Layout) -> None:
        pairs = [_levels(settings.of(tensor.name)) for tensor in layout.tensors]
        self.light = tuple(light for light, _ in pairs)
        self.heavy = tuple(heavy for _, heavy in pairs)
        self._small = Choice("dense", float(settings.small_bits))
        self._layout = layout
        self._momenta = momenta(settings, [tensor.name for tensor in layout.tensors])

    def fixed(self, key: Key) -> Choice | None:
        """Return the choice of a key about which no plan decides, buffers or small tensors; None for the others."""
        if key.buffer:
            return EXACT
        if key.small:
            return EXACT if any(self.light[part.tensor] == EXACT for part in key.slices) else self._small
        return None

    def momenta(self, key: Key) -> tuple[float, ...]:
        """Return the momentum that workers give each slice of a key before they encode; empty where they give none.

        It belongs to the tensor, whatever the key is sent as: small tensors and dense rounds have it, too.
        """
        names = [] if key.buffer else [self._layout.tensors[part.tensor].name for part in key.slices]
        momenta = tuple(self._momenta.get(name, 0.0) for name in names)
        return momenta if any(momenta) else ()

    def codecs(self) -> set[str]:
        """Return the names of the codecs of all compressible tensors."""
        return {self.light[index].codec for index in self._layout.compressible}

    def kinds(self) -> set[tuple[str, float, int]]:
        """Return codec, level and length of what keys may be sent as while plans ask for light and heavy levels only."""
        found: set[tuple[str, float, int]] = set()
        for key in self._layout.keys:
            fixed = self.fixed(key)
            choices = (self.light[key.tensor], self.heavy[key.tensor]) if fixed is None else (fixed,)
            found |= {(choice.codec, choice.level, key.elements) for choice in (*choices, EXACT, self._small)}
        return found


def codecs_of(settings: CodecSettings) -> Codecs:
    """Return all codecs that a process of the job may meet, with the job's options: all of ours, and those it names.

    Raises:
        CodecError: It names one that this process does not have.
    """
    return registry.suite(*_names(settings), **settings.options)


def matrices(settings: CodecSettings) -> Matrices:
    """Return what tells a `Layout` by the names of tensors which of them are matrices: those whose codec needs them whole.

    Raises:
        CodecError: As `codecs_of` does.
    """
    codecs = codecs_of(settings)
    return lambda name: codecs[settings.of(name).codec].scope == "tensor"


def lay_out(tensors: Sequence[Tensor], settings: Settings, *, num_shards: int | None = None) -> Layout:
    """Return the layout that all processes of a job have of a table of tensors.

    Args:
        tensors: The table.
        settings: Of the job.
        num_shards: Shards that keys are spread over; None takes all of the job.

    Raises:
        LayoutError: There is no layout of such a table.
        CodecError: As `codecs_of` does.
    """
    return Layout(
        tensors,
        num_shards=settings.num_shards if num_shards is None else num_shards,
        partition_elements=settings.partition_elements,
        matrices=matrices(settings.codec),
    )


def momenta(settings: CodecSettings, names: Iterable[str]) -> dict[str, float]:
    """Return the momentum that workers give tensors before they encode them, by name, of those that have any.

    Raises:
        CodecError: As `codecs_of` does.
    """
    codecs = codecs_of(settings)
    found = {name: codecs[settings.of(name).codec].momentum for name in names}
    return {name: momentum for name, momentum in found.items() if momentum}


def used(settings: CodecSettings) -> list[tuple[Codec, float]]:
    """Return the codecs that a job uses, at their levels: dense, and those that it names.

    Raises:
        CodecError, ConfigError: As `check` does.
    """
    check(settings)
    codecs = codecs_of(settings)
    choices = {choice for row in _rows(settings) for choice in _levels(row)}
    choices |= {EXACT, Choice(EXACT.codec, float(settings.small_bits))}
    return [(codecs[codec], level) for codec, level in sorted(choices)]


def levels_of(codec: str) -> tuple[float, float]:
    """Return the light and heavy level that a codec has where a job sets none.

    Raises:
        CodecError: There is no such codec, or it has none.
    """
    levels = LEVELS.get(codec) or registry.get(codec).levels
    if levels is None:
        raise CodecError(f"codec {codec} has no levels of its own: expected light and heavy to be set, each above 0")
    return levels


def check(settings: CodecSettings) -> None:
    """Refuse codecs and levels that this process does not have: before it takes part in a run.

    Raises:
        CodecError: There is no such codec or level; the message says which setting names it.
        ConfigError: There are more different choices than a plan can carry.
    """
    choices = set()
    for row in _rows(settings):
        where = f"codec.tensors {row.pattern!r}: " if row.pattern else ""
        try:
            codec = registry.get(row.codec)
            for choice in _levels(row):
                codec.check_level(choice.level)
                choices.add(choice)
        except CodecError as error:
            raise CodecError(f"{where}{error}") from None
    if len(choices) > MAX_PALETTE:
        raise ConfigError(
            f"codec.tensors comes to {len(choices)} different codecs and levels, and a plan has room for {MAX_PALETTE}: expected "
            "several patterns with the same levels"
        )


def unmatched(settings: CodecSettings, tensors: Sequence[Tensor]) -> Iterator[str]:
    """Yield what is to be said of rows that decide nothing about these tensors: no name matches, or an earlier row has them."""
    for row in settings.tensors.rows:
        mine = [tensor for tensor in tensors if not tensor.buffer and settings.of(tensor.name) == row]
        if not mine:
            yield f"codec.tensors: {row.pattern!r} decides about no tensor so far{_near(row.pattern, tensors)}"
        elif row.codec != EXACT.codec and all(tensor.small for tensor in mine):
            yield (
                f"codec.tensors: {row.pattern!r} = {row.codec!r} decides about small tensors only ({mine[0].name}), which always "
                "go dense"
            )


def _rows(settings: CodecSettings) -> list[TensorCodec]:
    return [TensorCodec(settings.name, settings.light, settings.heavy, ""), *settings.tensors.rows]


def _names(settings: CodecSettings) -> list[str]:
    return sorted({row.codec for row in _rows(settings)})


def _levels(row: TensorCodec) -> tuple[Choice, Choice]:
    light, heavy = (row.light, row.heavy) if row.light and row.heavy else levels_of(row.codec)
    return Choice(row.codec, row.light or light), Choice(row.codec, row.heavy or heavy)


def _near(pattern: str, tensors: Iterable[Tensor]) -> str:
    names = [tensor.name for tensor in tensors if not tensor.buffer]
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
    return f"; the nearest names are {', '.join(close)}"
