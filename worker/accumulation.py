"""What a backward adds to `p.grad`: which parameters it reaches, and means of earlier rounds, which must stay apart from it.

A backward synchronises if the forward that it belongs to ran outside `no_sync`, as under DistributedDataParallel. Each such
forward pays for one backward: a second one would leave gradients in each worker that no other knows of, and is refused.

This module has no postponed annotations: torch reads those of hooks.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ps_accordion.errors import UsageError

__all__ = ["Accumulation"]


class Accumulation:
    """Watches what backward adds to the parameters of one model.

    Args:
        ddp: The model, wrapped.
        parameters: Its parameters that are exchanged, in order.
        over: Says whether the session has ended: then whatever backward does is this process's own affair.

    Attributes:
        used: Parameters that were reached since the last round; None where every round reaches all.
        bases: Means of earlier rounds that were set aside, by parameter.
        holds: Whether a backward under `no_sync` has left gradients here since the last round, which the next one takes along.
    """

    def __init__(self, ddp: DistributedDataParallel, parameters: Sequence[nn.Parameter], over: Callable[[], bool]) -> None:
        self.used: set[int] | None = set() if ddp.find_unused_parameters or ddp.static_graph else None
        self.bases: dict[int, torch.Tensor] = {}
        self.holds = False
        self._parameters = parameters
        self._over = over
        self._handed_out: set[int] = set()
        """Parameters whose `grad` is, or comes from, the mean of an earlier round."""
        self._forward: Literal["none", "local", "synchronised"] = "none"
        me = weakref.ref(self)
        # The nodes of the graph that add to `p.grad`: hooks on parameters would run for torch.autograd.grad as well.
        self._nodes = [_adder_of(parameter) for parameter in parameters]
        for index, node in enumerate(self._nodes):
            node.register_prehook(_Note(me, index))
        ddp.register_forward_pre_hook(_Forward(me))

    def forward(self, ddp: DistributedDataParallel) -> None:
        """Note that the model runs."""
        if ddp.require_backward_grad_sync:
            self._forward = "synchronised"
            self.bases.clear()  # of a backward that was interrupted
        elif self._forward == "none":
            self._forward = "local"

    def note(self, index: int) -> None:
        """Note that backward is about to add to a parameter's gradient.

        Raises:
            UsageError: It must not: nobody would know of that gradient.
        """
        if self._over():
            return
        if self._forward == "none":
            raise UsageError(
                "a second synchronising backward, or one without a forward of the wrapped model: its gradients would stay in "
                "this worker. Run the wrapped model again before each backward, or add up the losses and call backward once; to "
                "accumulate gradients, run forward and backward under no_sync()"
            )
        if self._forward == "local":
            self.holds = True
        if self.used is not None:
            self.used.add(index)
        if index in self._handed_out:
            self._set_aside(index)

    def _set_aside(self, index: int) -> None:
        """Keep the mean of an earlier round apart from the local gradient that is about to be added to it."""
        held = self._parameters[index].grad
        if held is None:
            self._handed_out.discard(index)
        elif self._forward == "local":
            self._refuse_mixture()
        else:
            self._handed_out.discard(index)
            self.bases[index] = held.clone()
            with torch.no_grad():
                held.zero_()

    def _refuse_mixture(self) -> None:
        """Refuse local gradients on top of the mean of an earlier round, unless that was set to zero."""
        held = [grad for index in self._handed_out if (grad := self._parameters[index].grad) is not None]
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(held, float("inf"))])
        if norms.any():
            raise UsageError(
                "a backward under no_sync() found the mean gradient of an earlier round in p.grad, and would mix local gradients "
                "into it: call optimizer.zero_grad() after the step, before the first backward under no_sync()"
            )
        self._handed_out.clear()

    def keep_unused(self, index: int) -> None:
        """Keep what stands in the gradient of a parameter that this backward did not reach: the aggregate may overwrite it."""
        grad = self._parameters[index].grad
        if self.used is not None and index not in self.used and grad is not None:
            self.bases[index] = grad.clone()

    def finish(self) -> tuple[set[int] | None, dict[int, torch.Tensor]]:
        """End a round; return what was reached and what was set aside in it."""
        used, bases = None if self.used is None else self.used.copy(), self.bases
        if self.used is not None:
            self.used.clear()
        self.bases, self.holds = {}, False
        self._handed_out.clear()
        self._forward = "none"
        return used, bases

    def hand_out(self, index: int) -> None:
        """Note that a parameter's gradient is now a mean."""
        self._handed_out.add(index)


def _adder_of(parameter: nn.Parameter) -> Any:
    """Return the node of the graph that adds to a parameter's gradient. It lives as long as somebody holds it."""
    function = parameter.view_as(parameter).grad_fn
    assert function is not None, "a parameter that requires a gradient has one"
    return function.next_functions[0][0]


class _Note:
    """Tells its owner, as long as there is one, which parameter a backward reaches."""

    def __init__(self, owner: weakref.ref[Accumulation], index: int) -> None:
        self._owner = owner
        self._index = index

    def __call__(self, gradients: tuple[torch.Tensor | None, ...]) -> None:
        owner = self._owner()
        # An output that the loss leaves out reaches its parameters with nothing.
        if owner is not None and gradients[0] is not None:
            owner.note(self._index)


class _Forward:
    """Tells its owner, as long as there is one, that the model runs."""

    def __init__(self, owner: weakref.ref[Accumulation]) -> None:
        self._owner = owner

    def __call__(self, ddp: DistributedDataParallel, _: Any) -> None:
        owner = self._owner()
        if owner is not None and torch.is_grad_enabled():
            owner.forward(ddp)
