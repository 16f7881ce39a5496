"""A process group of this process alone, for the parent class of our wrapper: it moves nothing.

The parent still calls it: for the order of its buckets, and for which parameters were used, with tensors on the model's device.
"""

from __future__ import annotations

import functools
from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = ["group_of_one"]


@functools.cache
def group_of_one() -> dist.ProcessGroup:
    """Return the group of this process alone. It is never the default group: a sampler would take the world for one replica.

    It lives as long as the process. If a model were its last owner, a model that is dropped soon after it was made could wait for
    ever: torch joins the group's threads while it holds the interpreter's lock, which such a thread may wait for to let go of
    what it has just broadcast.
    """
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
