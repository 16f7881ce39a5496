"""Rounds of encoding and decoding with recordings, compared with what single operations make; on any device."""

from __future__ import annotations

import numpy as np
import torch
from machines import gaussian

from ps_accordion.codecs import Coding, get
from ps_accordion.codecs.device import decode, encode, open_parcel, twin_of
from ps_accordion.layout import Slice
from ps_accordion.worker.recorded import Recordings

__all__ = ["CASES", "N", "never", "results", "rounds"]

CASES = {
    "dense": 32, "bf16": 16, "int": 4, "natural": 8, "qsgd": 4, "terngrad": 2, "topk": 0.01, "threshold": 1.0, "dgc": 0.1,
    "onebit": 512, "signsgd": 1.0, "eden": 3, "quic_fl": 4, "random_block": 0.01, "random_k": 0.01, "powersgd": 2,
}  # fmt: skip
N = 10_007


def never(text: str) -> None:
    """Take no warning."""
    raise AssertionError(text)


def rounds(recordings: Recordings, codec: str, where: str, *, level: float | None = None, count: int = 5, n: int = N) -> None:
    """Encode some rounds of two keys in turn; fail unless all parcels and residuals are those of single operations."""
    twin, level = twin_of(get(codec)), CASES[codec] if level is None else level
    kept = [torch.from_numpy(gaussian(n, 90 + key)).to(where) for key in range(2)]
    expected, parcels = [each.clone() for each in kept], []
    for round_ in range(count):
        for key in range(2):
            dtype = torch.bfloat16 if round_ == 3 else torch.float64 if round_ == 4 else torch.float32
            gradient = torch.from_numpy(gaussian(n, 10 * round_ + key)).to(where, dtype)
            if round_ == 2:
                gradient[7] = float("nan")
            seed = 0x0123_4567_89AB_CDEF * (10 * round_ + key + 1) % (1 << 64)
            recordings.record()
            made = recordings.encode(twin, gradient, kept[key], level=level, seed=seed)
            other = encode(twin, gradient, expected[key], level=level, seed=seed)
            if round_ == 2:
                assert open_parcel(twin, made.cpu().numpy(), elements=n, level=level) is None
            else:
                parcels.append((made, other))
    for parcel, other in parcels:  # at the end: a parcel is not written again
        made, expects = (open_parcel(twin, each.cpu().numpy(), elements=n, level=level) for each in (parcel, other))
        assert made is not None
        assert expects is not None
        assert (made.payload.tobytes(), made.count, made.loss) == (expects.payload.tobytes(), expects.count, expects.loss)
    for mine, theirs in zip(kept, expected, strict=True):
        assert torch.equal(mine, theirs)


def results(recordings: Recordings, codec: str, where: str, *, count: int = 4, n: int = N, sparse: bool = False) -> None:
    """Decode some results into two keys in turn, to slices of either type; fail unless they are those of single operations."""
    known = get(codec)
    twin, level = twin_of(known), CASES[codec]
    for round_ in range(count):
        v, seed = gaussian(n, round_) * np.float32(2.0**round_), 77 * round_ + 5
        if sparse:
            v[round_ + 1 :] = 0
        payload = np.zeros(known.payload_bound(n, level), np.uint8)
        encoded = known.encode(v, np.zeros(n, np.float32), level=level, seed=seed, out=payload)
        assert encoded is not None
        coding = Coding(codec, level, n, encoded.count, seed if known.shared_seed else 0)
        whole = torch.full((n,), float("nan"), device=where)
        decode(twin, payload[: encoded.nbytes], coding, whole)
        for key, dtype in enumerate((torch.float32, torch.bfloat16)):
            lengths = (n,) if key == 0 else (17, n - 17)
            parts = [Slice(i, 0, length, 17 * i) for i, length in enumerate(lengths)]
            out = [(part, torch.full((part.length,), float("nan"), dtype=dtype, device=where)) for part in parts]
            recordings.record()
            recordings.decode(twin, payload[: encoded.nbytes], coding, out)
            assert torch.equal(torch.cat([view for _, view in out]), whole.to(dtype))
