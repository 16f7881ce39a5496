"""What people use today, timed beside our codecs in the same run: the arithmetic of PyTorch's own compressors.

    dense 16    `half.copy_(gradient)`, as DistributedDataParallel's fp16 hook casts
    topk        the sum with the residual, `torch.topk` of its magnitudes, and the residual without what is sent
    powersgd    a step with feedback on a square matrix (Vogels et al., 2019): P = M Q, made orthogonal, Q' = M^T P, and the
                residual M - P Q'^T

Buffers are made once and used again where torch lets that be. One thread, as codecs have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from .codec_speed import Case, Timed, distribution, timed

__all__ = ["rivals_of"]


def rivals_of(case: Case, elements: int) -> Iterator[dict[str, Any]]:
    """Time what people would use instead of a codec at a level, if there is something and torch is installed.

    Args:
        case: Codec and level.
        elements: Length of the vectors.

    Yields:
        Rows as `codec_speed.measure` has them, of a codec called `torch ...`, without squared errors.
    """
    square = math.isqrt(elements) ** 2 == elements
    if not (case == Case("dense", 16) or case.codec == "topk" or (case.codec == "powersgd" and square)):
        return  # before vectors are drawn
    try:
        import torch
    except ImportError:  # as on a machine of servers
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source = np.ones(elements, np.float32)
    try:
        for name, op, nbytes, call in _calls(torch, case, elements):
            yield timed(Timed(f"torch {name}", op, case.level, elements, 1), [call], source) | {
                "bytes_per_element": round(nbytes / elements, 5),
                "sq_error": {},
            }
    finally:
        torch.set_num_threads(threads)


def _calls(torch: Any, case: Case, elements: int) -> Iterator[tuple[str, str, int, Any]]:
    gradient = torch.from_numpy(distribution("gaussian", elements))
    residual = torch.zeros_like(gradient)
    if case == Case("dense", 16):
        half = torch.empty_like(gradient, dtype=torch.float16)
        yield "fp16", "encode", 2 * elements, lambda: half.copy_(gradient)
        yield "fp16", "decode", 2 * elements, lambda: gradient.copy_(half)
    elif case.codec == "topk":
        k = max(1, math.ceil(case.level * elements))

        def topk() -> None:
            residual.add_(gradient)
            places = residual.abs().topk(k, sorted=False).indices
            residual[places].contiguous()
            residual[places] = 0

        yield "topk", "encode_feedback", 12 * k, topk  # indices have 8 bytes
    else:
        rank, side = int(case.level), math.isqrt(elements)
        matrix, kept = gradient.view(side, side), residual.view(side, side)
        right = torch.randn(side, rank, generator=torch.Generator().manual_seed(0))

        def powersgd() -> None:
            kept.add_(matrix)
            left, _ = torch.linalg.qr(kept @ right)
            torch.matmul(kept.t(), left, out=right)
            kept.addmm_(left, right.t(), alpha=-1)

        yield "powersgd", "encode_feedback", 8 * rank * side, powersgd
