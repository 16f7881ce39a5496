"""What cannot be trained through our servers, said before anything is sent, with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ps_accordion.errors import UsageError

SHARDED = {"FullyShardedDataParallel", "FSDPModule"}
"""Classes that a model sharded by FSDP is made of, by name: importing them takes longer than anything else here."""

__all__ = ["ParameterSet", "refuse_models", "refuse_options"]

OWN_GROUP = "it brings its own group, and the session says who takes part"
NO_HOOK = "such gradients would not go through the servers"
OPTIONS = {
    "process_group": OWN_GROUP,
    "device_mesh": OWN_GROUP,
    "delay_all_reduce_named_params": NO_HOOK,
    "param_to_hook_all_reduce": NO_HOOK,
    "skip_all_reduce_unused_params": NO_HOOK,
}
"""Options of DistributedDataParallel that DistributedModel does not have, and why."""


def refuse_options(options: Mapping[str, Any]) -> None:
    """Raise `UsageError` for an option that is set and cannot be obeyed."""
    for option, reason in OPTIONS.items():
        if options.get(option):
            raise UsageError(f"DistributedModel has no option {option!r}: {reason}; leave it out")


def refuse_models(module: nn.Module, *, own_group: bool = False) -> None:
    """Raise `UsageError` for a model that would train wrongly.

    Args:
        module: The model.
        own_group: Whether all workers have a process group of their own for it.
    """
    if isinstance(module, DistributedDataParallel):
        raise UsageError(
            "the model is wrapped already; hand DistributedModel the model itself, or register our hook on your own "
            "DistributedDataParallel: attach(model, session=session)"
        )
    for name, child in module.named_modules():
        if SHARDED & {base.__name__ for base in type(child).__mro__}:
            raise UsageError(
                f"{name or 'the model'!r} is sharded by FSDP: each worker holds a part of it, and gradients here are of whole "
                "parameters; hand over the model unsharded, or use FSDP without ps-accordion"
            )
        if getattr(child, "sparse", False) is True:
            raise UsageError(f"{name!r} makes sparse gradients; build it with sparse=False, which top-k compresses as well")
        if isinstance(child, nn.SyncBatchNorm) and not own_group:
            raise UsageError(
                f"{name!r} is a SyncBatchNorm, which needs a group of all workers in every forward; use BatchNorm, whose running "
                "statistics follow the lowest rank, or GroupNorm, which has none"
            )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UsageError(f"parameter {name!r} has no shape yet; run one batch through the model before it is wrapped")
        if type(parameter.data).__name__ == "DTensor":
            raise UsageError(
                f"parameter {name!r} is a DTensor, of which each worker holds a part; hand over whole parameters, or use FSDP or "
                "tensor parallelism without ps-accordion"
            )
        if parameter.is_complex():
            raise UsageError(f"parameter {name!r} is complex; expected real parameters. Keep its real and imaginary parts apart")


class ParameterSet:
    """The parameters of a model as they were when it was wrapped; says so when they change.

    The check runs at every forward. It compares identities, a few microseconds for a hundred layers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._children = [child._modules for child in self._modules]
        self._tables = [child._parameters for child in self._modules]
        self._frozen = [(name, parameter) for name, parameter in module.named_parameters() if not parameter.requires_grad]
        self._known = self._now()

    def _now(self) -> tuple[int, ...]:
        tables = chain.from_iterable(table.values() for table in self._tables)
        children = chain.from_iterable(table.values() for table in self._children)
        return (*map(id, tables), *map(id, children))

    def check(self) -> None:
        """Raise `UsageError` if parameters were added, replaced, removed or unfrozen since the model was wrapped."""
        if self._now() != self._known:
            raise UsageError(
                "parameters or layers of the model were added, replaced or removed after it was wrapped, so the workers would "
                "not exchange their gradients; change the model first, then wrap it (again)"
            )
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise UsageError(
                    f"parameter {name!r} was frozen when the model was wrapped and requires a gradient now, which the workers "
                    "would not exchange; unfreeze it before the model is wrapped, or wrap the model again"
                )
