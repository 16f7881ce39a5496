"""A process group of this process alone, for the parent class of our wrapper: it moves nothing.

The parent still calls it: for the order of its buckets, and for which parameters were used, with tensors on the model's device.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = ["group_of_one"]


def group_of_one() -> dist.ProcessGroup:
    """Return a group of this process alone. It is never the default group: a sampler would take the world for one replica."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # there, but not in torch's list of names
    group = dist.ProcessGroup(store, 0, 1)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the only way to name the interface
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(minutes=1)
    backend = dist.ProcessGroupGloo(store, 0, 1, options)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        group._register_backend(torch.device(accelerator.type), dist.ProcessGroup.BackendType.GLOO, backend)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    return group
