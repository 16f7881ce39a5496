"""DistributedDataParallel whose gradients travel through our servers.

The parent does what it is good at (buckets, overlap with backward, `no_sync`, `state_dict`) over a group of one rank, which moves
nothing; a communication hook hands every bucket to the session. What becomes of them stands in `gradients.py`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ps_accordion.errors import UsageError
from ps_accordion.imports import collection_paused

from .base import BaseSession
from .buffers import Buffers
from .connect import current
from .gradients import Gradients
from .group import group_of_one
from .joining import joined
from .memory import state_of
from .refuse import ParameterSet, refuse_models, refuse_options

__all__ = ["DistributedModel", "attach"]


class DistributedModel(DistributedDataParallel):
    """Wraps a model so that `backward` leaves the workers' mean gradient in `p.grad`, the same bits in every worker.

    Parameters and buffers of the lowest rank are copied to all when the wrapper is made; floating-point buffers of the
    `state_dict` follow the lowest rank that trains in every round.

    A round in which some worker's gradient was not finite is skipped by all: every `p.grad` is None after `backward`, so that an
    optimizer step changes nothing; the finite gradients of that round come with the next one. With a tracked GradScaler they are
    all infinite instead, so that it does what it always does.

    Args:
        module: The model.
        device_ids: As in DistributedDataParallel: None, or the one device of the model.
        output_device: As in DistributedDataParallel.
        dim: As in DistributedDataParallel.
        broadcast_buffers: Whether buffers follow the lowest rank; None and True mean that they do.
        init_sync: Whether the initial state is copied; without, all workers must have built the same.
        session: This worker's session; None takes the one that `connect` made.
        **options: Other options of DistributedDataParallel. `gradient_as_bucket_view` is on unless it is set.

    Raises:
        UsageError: The model or an option cannot be trained this way.
        JoinRefused: Another worker holds a different model.
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: Any = None,
        output_device: Any = None,
        dim: int = 0,
        broadcast_buffers: bool | None = None,
        init_sync: bool = True,
        *,
        session: BaseSession | None = None,
        **options: Any,
    ) -> None:
        refuse_options(options)
        refuse_models(module)
        session = session if session is not None else current()
        options.setdefault("gradient_as_bucket_view", True)
        follow = options.pop("forward_sync_buffers", None)
        with collection_paused():  # the parent loads torch._dynamo
            super().__init__(
                module,
                device_ids=device_ids,
                output_device=output_device,
                dim=dim,
                process_group=group_of_one() if session.local is None else session.local.group,
                forward_sync_buffers=False,
                init_sync=False,
                **options,
            )
        self._session = session
        self._parameter_set = ParameterSet(module)
        self._gradients = Gradients(
            self,
            session,
            state=state_of(module, copy_buffers=session.is_donor) if init_sync else None,
            buffers=None if broadcast_buffers is False or follow is False else Buffers(module, self.parameters_to_ignore),
        )

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._parameter_set.check()
            self._gradients.entering()
        return super().forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]  # torch has no hints here

    @contextlib.contextmanager
    def join(
        self, divide_by_initial_world_size: bool = True, enable: bool = True, throw_on_early_termination: bool = False
    ) -> Iterator[None]:
        """Let workers have different numbers of batches; see `BaseSession.join`, which does the same for all models of a session.

        Args:
            divide_by_initial_world_size: Whether a missing gradient counts as zero in the mean, or not at all.
            enable: False makes this do nothing.
            throw_on_early_termination: Not supported.

        Raises:
            UsageError: `throw_on_early_termination` is set.
        """
        if throw_on_early_termination:
            raise UsageError("join() has no option 'throw_on_early_termination': workers that have data left go on; leave it out")
        yield
        if enable:
            joined(
                self._session,
                [self._gradients],
                [self._gradients.tracked],
                divide_by_initial_world_size=divide_by_initial_world_size,
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load parameters and buffers, saved from a wrapped model (names begin with `module.`) or from a plain one.

        Load the same in every worker: nothing is copied between them.
        """
        if state_dict and not any(name.startswith("module.") for name in state_dict):
            return self.module.load_state_dict(state_dict, *args, **kwargs)
        return super().load_state_dict(state_dict, *args, **kwargs)


def attach(model: DistributedDataParallel, *, session: BaseSession | None = None) -> None:
    """Send the gradients of your own DistributedDataParallel model through our servers.

    Its group then only carries what the parent itself sends: the initial state, buffers, and which parameters were used.
    Make it as always, and call this before the first backward. Every worker of the session does the same.

    Args:
        model: The wrapped model, whose communication hook is free.
        session: This worker's session; None takes the one that `connect` made.

    Raises:
        UsageError: The model cannot be trained this way.
    """
    if isinstance(model, DistributedModel):
        raise UsageError("a DistributedModel sends its gradients through our servers already; use it as it is")
    if not isinstance(model, DistributedDataParallel):
        raise UsageError(f"expected a DistributedDataParallel, got {type(model).__name__}; wrap the model with DistributedModel")
    refuse_models(model.module, own_group=True)
    session = session if session is not None else current()
    # The model keeps it alive; it holds the model weakly.
    gradients = Gradients(model, session, state=None, buffers=None)
    object.__setattr__(model, "_ps_accordion", gradients)
    model.register_forward_pre_hook(_Entering(gradients))


class _Entering:
    """Takes part before a forward that trains. A class, because a model that is copied or pickled takes its hooks along."""

    def __init__(self, gradients: Gradients | None = None) -> None:
        self._gradients = weakref.ref(gradients) if gradients is not None else None

    def __call__(self, *_: object) -> None:
        gradients = self._gradients() if self._gradients is not None else None
        if gradients is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients.entering()

    def __reduce__(self) -> tuple[type[_Entering], tuple[()]]:
        return _Entering, ()
