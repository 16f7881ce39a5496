"""Codecs on a torch device: the worker's half of each codec, for gradients that lie on an accelerator.

A twin writes the payload that the host codec writes for the same vector, level and seed, and leaves the same residual, to the
bit.
`encode` launches work and reads nothing back: no shape, branch or scalar on the host depends on what a tensor holds.
What the host must know (is it finite, how many entries, what a switch threw away) comes with the payload, in one copy: the
*parcel*.

Servers have no twins, and nothing that they import leads here: this package imports torch.
"""

from __future__ import annotations

from .base import DeviceCodec, host_memory, stage
from .parcel import Advance, Opened, accumulate, decode, encode, open_parcel
from .registry import twin_of
from .switch import norm, settle

__all__ = [
    "Advance",
    "DeviceCodec",
    "Opened",
    "accumulate",
    "decode",
    "encode",
    "host_memory",
    "norm",
    "open_parcel",
    "settle",
    "stage",
    "twin_of",
]
