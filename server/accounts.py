"""A shard's part of the loss ledger: what came in pushes, what went out in results, what is left (`ps_accordion/ledger.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ps_accordion.codecs import Push, registry
from ps_accordion.codecs.base import Coding, FloatVector, Payload
from ps_accordion.codecs.registry import Codecs
from ps_accordion.layout import Slice
from ps_accordion.ledger import NOTHING, SILENCE, Probe, Tally, added

from .record import KeyRecord

__all__ = ["closed", "counted"]


def counted(
    probe: Probe,
    tally: Tally,
    pushes: Sequence[Push],
    total_weight: float,
    result: tuple[Coding, Payload] | None,
    residuals: tuple[FloatVector | None, FloatVector | None],
    *,
    codecs: Codecs,
    unused: Sequence[Slice],
    lost: float,
) -> Tally:
    """Return a key's account after one more round.

    Args:
        probe: Of the key.
        tally: The account before.
        pushes: What was folded.
        total_weight: By which the sum was divided.
        result: What came out; None where all of it stayed in the residual.
        residuals: Before and after the fold, float32[elements]; None is zero.
        codecs: Codecs by name.
        unused: Slices that nobody used: they were not encoded.
        lost: Norm of what a switch of level threw away. Where it threw something away, its mass is what the round lacks, and
            what the result's codec may have rounded off is in it.
    """
    if not probe.counts:
        return tally
    scale = np.float32(1.0 / total_weight)
    parts = [(push.weight, probe.decoded(registry.find(codecs, push.coding.codec), push.payload, push.coding)) for push in pushes]
    seen = [(weight, probe.stretch(part)) for weight, part in parts]
    came = float(scale) * sum(weight * each.mass for weight, each in seen)
    went, noise = NOTHING, SILENCE
    if result is not None:
        coding, payload = result
        codec = registry.find(codecs, coding.codec)
        went = probe.payload(codec, payload, coding)
        if codec.noisy(coding.level) and not lost:
            total = np.zeros(probe.length, np.float32)
            for weight, part in parts:
                total += np.float32(weight) * part
            noise = probe.noise(codec, payload, coding, total * scale + probe.cut(residuals[0], unused))
    after = probe.vector(residuals[1])
    thrown = came + probe.vector(residuals[0]).mass - went.mass - after.mass if lost else 0.0
    norms = (*(float(scale) * weight * len(pushes) * each.norm for weight, each in seen), went.norm, after.norm)
    other = sum(each.mass for _, each in seen)
    return tally.plus(came=came, went=went.mass, lost=thrown, other=other, norms=norms, noise=noise)


def closed(records: Iterable[tuple[Probe, KeyRecord]]) -> Tally:
    """Return a shard's account: that of all keys, with what is left in their residuals."""
    return added(record.tally._replace(kept=probe.vector(record.residual()).mass) for probe, record in records)
