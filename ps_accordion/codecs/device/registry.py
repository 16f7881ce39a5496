"""Twins by codec."""

from __future__ import annotations

from ...errors import CodecError
from .. import plugins
from ..base import Codec
from .base import DeviceCodec
from .bf16 import BF16Twin
from .buckets import IntTwin, NaturalTwin, QsgdTwin, TernGradTwin
from .dense import DenseTwin
from .dgc import DGCTwin
from .eden import EdenTwin
from .onebit import OneBitTwin
from .powersgd import PowerSgdTwin
from .quic_fl import QuicFLTwin
from .random_block import RandomBlockTwin
from .random_k import RandomKTwin
from .signsgd import SignSGDTwin
from .threshold import ThresholdTwin
from .topk import TopKTwin

__all__ = ["twin_of"]

_TWINS: tuple[type[DeviceCodec], ...] = (
    BF16Twin,
    DenseTwin,
    DGCTwin,
    EdenTwin,
    IntTwin,
    NaturalTwin,
    OneBitTwin,
    PowerSgdTwin,
    QsgdTwin,
    QuicFLTwin,
    RandomBlockTwin,
    RandomKTwin,
    SignSGDTwin,
    TernGradTwin,
    ThresholdTwin,
    TopKTwin,
)
_CLASSES: dict[str, type[DeviceCodec]] = {twin.name: twin for twin in _TWINS}


def twin_of(codec: Codec) -> DeviceCodec:
    """Return the twin of a codec.

    Raises:
        CodecError: It has none.
    """
    twin = _CLASSES.get(codec.name) or plugins.load(plugins.TWINS, codec.name, DeviceCodec, ours=_CLASSES)
    if twin is None:
        raise CodecError(
            f"codec {codec.name} has no form for accelerators: expected one of {', '.join(sorted(_CLASSES))}; "
            f"choose one of these, train on the CPU, or declare a twin in entry point group {plugins.TWINS}"
        )
    return twin(codec)
