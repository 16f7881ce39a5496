"""What benchmarks compare with: DistributedDataParallel over the default process group, plain and with torch's hooks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

__all__ = ["BASELINES"]


def _ddp(module: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module)


def _ddp_fp16(module: nn.Module) -> nn.Module:
    model = nn.parallel.DistributedDataParallel(module)
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return model


def _ddp_powersgd(module: nn.Module) -> nn.Module:
    # One bucket for all: with several its callbacks wait on the threads of gloo that they run on, for ever.
    model = nn.parallel.DistributedDataParallel(module, bucket_cap_mb=1 << 12)
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return model


BASELINES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": _ddp,
    "ddp_fp16": _ddp_fp16,
    "ddp_powersgd": _ddp_powersgd,
}
"""Wrappers of a module by name. The process group that they use has been initialised."""
