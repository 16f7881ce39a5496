"""Twins by codec."""

from __future__ import annotations

from ...errors import CodecError
from ..base import Codec
from .base import DeviceCodec
from .buckets import IntTwin, NaturalTwin, QsgdTwin, TernGradTwin
from .dense import DenseTwin
from .onebit import OneBitTwin
from .random_block import RandomBlockTwin
from .topk import TopKTwin

__all__ = ["twin_of"]

_CLASSES: dict[str, type[DeviceCodec]] = {
    twin.name: twin for twin in (DenseTwin, IntTwin, NaturalTwin, OneBitTwin, QsgdTwin, RandomBlockTwin, TernGradTwin, TopKTwin)
}


def twin_of(codec: Codec) -> DeviceCodec:
    """Return the twin of a codec.

    Raises:
        CodecError: It has none.
    """
    twin = _CLASSES.get(codec.name)
    if twin is None:
        raise CodecError(
            f"codec {codec.name} has no form for accelerators: expected one of {', '.join(sorted(_CLASSES))}; "
            "choose one of these, or train on the CPU"
        )
    return twin(codec)
