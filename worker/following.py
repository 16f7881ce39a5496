"""The codecs of one key at a worker. Some go on from the last result of the key: that is kept here, from round to round.

A result counts when its round does, so it is noted when it comes and taken over when the round is decided. All members decide a
round by the same results, so all go on alike; a worker that joins, or a run that is taken up, gets what it goes on from with the
state of the rounds (`Start`). Without it a codec begins anew, which is worse for some rounds, and no less right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ps_accordion.codecs import Codec, Coding, registry
from ps_accordion.codecs.base import Payload
from ps_accordion.config import Settings
from ps_accordion.errors import CodecError, WireError
from ps_accordion.layout import Key
from ps_accordion.selection import codecs_of

__all__ = ["KeyCodecs", "Start"]


@dataclass(frozen=True)
class Start:
    """A result that the codec of a key goes on from. The key is named by what is in it: numbers differ between layouts.

    Attributes:
        tensor: Index of its tensor.
        start: First element of it in that tensor.
        coding: What the header of the result says.
        payload: And its payload.
    """

    tensor: int
    start: int
    coding: Coding
    payload: bytes


class KeyCodecs:
    """The codecs of one key, by name.

    Args:
        key: The key.
        settings: The settings of the job.
    """

    def __init__(self, key: Key, settings: Settings) -> None:
        self._key = key
        self._codecs = dict(registry.fitted(codecs_of(settings.codec), key.rows))
        self._next: tuple[Payload, Coding] | None = None
        self._last: tuple[Payload, Coding] | None = None

    def find(self, name: str) -> Codec:
        """Return the codec of that name, going on from the last result that counts if it is one that does.

        Raises:
            CodecError: There is none.
        """
        return registry.find(self._codecs, name)

    def result(self, payload: Payload, coding: Coding) -> None:
        """Note a result of the open round, validated, in the place of one that a view has taken back; it is copied."""
        if self._codecs[coding.codec].scope == "tensor":
            self._next = payload.copy(), coding

    def decided(self, *, applied: bool) -> None:
        """Note that the open round is decided, and whether its result counts."""
        if applied and self._next is not None:
            self._follow(*self._next)
        self._next = None

    def _follow(self, payload: Payload, coding: Coding) -> None:
        self._last = payload, coding
        self._codecs[coding.codec] = self._codecs[coding.codec].following(payload, coding)

    @property
    def start(self) -> Start | None:
        """What the next encoding goes on from; None where that is nothing."""
        part = self._key.slices[0]
        return None if self._last is None else Start(part.tensor, part.start, self._last[1], self._last[0].tobytes())

    def go_on(self, start: Start) -> None:
        """Go on from another worker's, or an earlier run's, last result.

        Raises:
            WireError: It is none of this key.
        """
        payload = np.frombuffer(bytearray(start.payload), np.uint8)
        try:
            if start.coding.elements != self._key.elements:
                raise CodecError(f"expected {self._key.elements} elements, got {start.coding.elements}")
            self.find(start.coding.codec).validate(payload, start.coding)
        except (CodecError, WireError) as error:
            raise WireError(f"key {self._key.number} cannot go on from the result that was handed over: {error}") from None
        self._follow(payload, start.coding)
