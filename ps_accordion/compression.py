"""`[codec]`: what gradients are compressed with where nobody says otherwise, and what can be said."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta
from msgspec.structs import force_setattr

from .patterns import TensorCodec, TensorCodecs
from .sections import Section

__all__ = ["LEVELS", "CodecSettings"]

LEVELS = {
    "bf16": (16.0, 16.0),
    "dense": (32.0, 16.0),
    "dgc": (0.04, 0.005),
    "eden": (4.0, 1.0),
    "int": (8.0, 4.0),
    "natural": (8.0, 8.0),
    "onebit": (512.0, 2048.0),
    "powersgd": (4.0, 1.0),
    "qsgd": (8.0, 4.0),
    "quic_fl": (8.0, 4.0),
    "random_block": (0.4, 0.04),
    "random_k": (0.2, 0.04),
    "signsgd": (2.0**-10, 2.0**-10),
    "terngrad": (2.0, 2.0),
    "threshold": (0.01, 0.05),
    "topk": (0.04, 0.005),
}
"""Light and heavy level of each codec where none is set."""


class CodecSettings(Section):
    """`[codec]`: how gradients are compressed, both ways."""

    name: str = "topk"
    """Codec of every tensor that is worth compressing: bf16, dense, dgc, eden, int, natural, onebit, powersgd, qsgd, quic_fl,
    random_block, random_k, signsgd, terngrad, threshold, topk."""
    light: Annotated[float, Meta(ge=0)] = 0.0
    """Level in critical regimes and whenever in doubt: little compression. A kept fraction; for dense (32 or 16), bf16 (16),
    eden (1 to 4), int, qsgd and quic_fl (8, 4 or 2), natural (8) and terngrad (2), bits; for onebit, elements that share a size;
    for powersgd, a rank; for signsgd, what a sign stands for; for threshold, the magnitude from which elements are sent, both in
    the unit of the gradients.
    0 takes the codec's own: dgc and topk 0.04, random_block 0.4, random_k 0.2, dense 32, bf16 16, eden 4, int, natural, qsgd and
    quic_fl 8, terngrad 2, onebit 512, powersgd 4, signsgd 2^-10, threshold 0.01."""
    heavy: Annotated[float, Meta(ge=0)] = 0.0
    """Level elsewhere: much compression. 0 takes the codec's own: dgc and topk 0.005, random_block and random_k 0.04, dense and
    bf16 16, eden 1, int, qsgd and quic_fl 4, natural 8, terngrad 2, onebit 2048, powersgd 1, signsgd 2^-10, threshold 0.05."""
    values: Literal["fp16", "fp32", "int8", "packed"] = "fp16"
    """How kept values are written (dgc, threshold, topk), with their places: in 4 bytes (fp16), 6 (fp32), 3 (int8), or 2 (packed:
    a sign and a power of two). What rounding takes away stays in the residual."""
    cap: Annotated[float, Meta(gt=0, le=0.25)] = 0.125
    """Largest fraction of elements that threshold sends; what is more waits in the residual."""
    coverage: Literal["independent", "cyclic"] = "independent"
    """How random_block and random_k choose places: anew every round, or in turn, so that no element waits longer than it takes to
    send all of them once."""
    bucket: Literal[128, 256, 512, 1024, 2048, 4096] = 512
    """Elements that share a scale (int, natural, qsgd, terngrad): fewer are more accurate, at 32 bits each time."""
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    """Momentum of dgc, which workers give gradients before they are compressed: the optimizer must have none (momentum = 0)."""
    small_bits: Literal[16, 32] = 16
    """Format of tensors too small to compress (1-D, or under 1,024 elements): 16 or 32 bits an element."""
    residual_at_switch: Literal["keep", "clip", "reset"] = "clip"
    """What happens to a tensor's stored residual when its level turns lighter (docs/decisions says why this default)."""
    tensors: TensorCodecs = TensorCodecs()
    """Other codecs by the name of the tensor, a line each: "*.bias" = "dense", or
    "encoder.*" = {codec = "topk", light = 0.1, heavy = 0.01}. The first pattern that matches decides, and `[codec]` where none
    does; * stands for anything, ? for one character, and names are those of `model.named_parameters()`. As a flag or variable it
    is an inline table: --set 'codec.tensors={"*.bias" = "dense"}'."""

    def __post_init__(self) -> None:
        # Set past `given`: what nobody set must not count as set.
        light, heavy = LEVELS.get(self.name, (0.0, 0.0))
        force_setattr(self, "light", self.light or light)
        force_setattr(self, "heavy", self.heavy or heavy)
        force_setattr(self, "tensors", self.tensors.filled(LEVELS))

    def of(self, tensor: str) -> TensorCodec:
        """Return codec and levels of the tensor with this name; a level of 0 is the codec's own."""
        return self.tensors.of(tensor) or TensorCodec(self.name, self.light, self.heavy)

    @property
    def options(self) -> dict[str, str | int | float]:
        """What codecs are made with, by the name of the option."""
        return {
            "bucket": self.bucket,
            "cap": self.cap,
            "coverage": self.coverage,
            "momentum": self.momentum,
            "values": self.values,
        }
