"""The gradients of one wrapped model, from backward to the session and back.

DistributedDataParallel hands over buckets; the session decides rounds; what this module promises is `p.grad` after backward:

* where any worker used the parameter: the mean, the same bits in every worker, on top of what an earlier synchronised backward
  left there (as under DistributedDataParallel, where gradients that were not zeroed add up);
* where no worker used it: what stood there before, None after `zero_grad()`;
* after a skipped round: None everywhere, so that `optimizer.step()` changes nothing; all infinite under a tracked GradScaler, so
  that it skips the step and lowers its scale in every worker alike.

Gradients are unscaled before they leave, and scaled again when they are back: a worker's scale is nobody else's business.

This module has no postponed annotations: torch reads those of the hook.
"""

import contextlib
import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ps_accordion.errors import RunAborted, UsageError
from ps_accordion.layout import Tensor
from ps_accordion.selection import momenta

from . import snapshot
from .accumulation import Accumulation
from .base import BaseSession
from .buffers import Buffers
from .local import LocalGroup
from .memory import HostGradient, StateBytes, device_of, order_in_memory
from .rounds import Decide

__all__ = ["Gradients"]

KINDS = ("DATA", "SKIP", "FAILED")
"""What the processes of one host tell each other of a round."""


class Gradients:
    """What one model's backwards hand over, and what they get back.

    The hook is registered here; whoever made this object keeps it alive as long as the model trains.

    Args:
        ddp: The model, wrapped. Its communication hook must be free.
        session: This worker's session.
        state: What all workers shall start from as the lead has it; None where that is settled already.
        buffers: Buffers that follow the lead in every round; None where they are not ours to move.
    """

    def __init__(
        self, ddp: DistributedDataParallel, session: BaseSession, *, state: StateBytes | None, buffers: Buffers | None
    ) -> None:
        named = [
            (name, parameter)
            for name, parameter in ddp.module.named_parameters()
            if parameter.requires_grad and name not in ddp.parameters_to_ignore
        ]
        self.parameters = [parameter for _, parameter in named]
        self._ddp = weakref.ref(ddp)
        self._as_views = bool(ddp.gradient_as_bucket_view)
        self._session = session
        _refuse_shared(named, session.models)
        self._index = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        self._buffers = buffers if buffers is not None and buffers.elements else None
        rows = [_row(name, parameter) for name, parameter in named]
        if self._buffers is not None:
            rows.append(self._buffers.row)
        self._before_forward: dict[str, torch.Tensor] | None = None
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._round = _Round()
        me = weakref.ref(self)
        self.tracked = session.open_layout(
            rows, decided=lambda decision: _call(me, "_on_decided", decision), state=state, device=device_of(named)
        )
        if session.local is not None and ddp.process_group is session.local.group:
            session.local.share(tensor.detach() for tensor in (*ddp.module.parameters(), *ddp.module.buffers()))
        if self._buffers is not None:
            self._buffers.agree()
        self._accumulation = Accumulation(ddp, self.parameters, over=lambda: session.closed)
        self.tracked.settled = lambda: _is_settled(me)
        self.tracked.take = lambda: _take(me)
        self.tracked.apply = lambda state: _call(me, "_apply", state)
        session.on_failure(lambda error: _call(me, "_on_failure", error))
        session.training.trains(named, momenta(session.settings.codec, (name for name, _ in named)))
        self.tracked.rate = lambda: _rate_of(me)
        session.add_model(self)
        # The parent's C++ half keeps the hook alive, out of sight of the garbage collector: it must not keep us.
        ddp.register_comm_hook(me, _hook)

    @property
    def module(self) -> nn.Module | None:
        """The model itself, as long as it lives."""
        ddp = self._ddp()
        return ddp.module if ddp is not None else None

    @torch.no_grad()
    def settle(self) -> None:
        """Forget what may differ between workers that come to a join: gradients, and buffers that no round has carried."""
        for parameter in self.parameters:
            parameter.grad = None
        if self._buffers is not None:
            self._buffers.spread(moved=False)

    def agree(self) -> None:
        """Take the buffers as they are now for what all workers have."""
        if self._buffers is not None:
            self._buffers.agree()

    def entering(self) -> None:
        """Take part in the run, before a forward that trains; remember what the forward is about to change."""
        self._session.take_part()
        module = self.module
        if self._before_forward is None and module is not None:
            # Counters of batches, say. Whoever joins in this round runs a forward of its own.
            moving = self._buffers.agreed if self._buffers is not None else {}
            self._before_forward = {name: buffer.clone() for name, buffer in module.named_buffers() if name not in moving}

    def _apply(self, state: bytes) -> None:
        """Take over the state that another worker has, with which the open round begins."""
        if self.module is not None:
            self.settle()
            snapshot.apply(state, self.module, self._session.training)
            self.agree()

    @property
    def accumulates(self) -> bool:
        """Whether gradients lie here that the last backward of this step is to take along."""
        return self._accumulation.holds

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which backward keeps its gradients here."""
        ddp = self._ddp()
        return ddp.no_sync() if ddp is not None else contextlib.nullcontext()

    # ------------------------------------------------------------ backward's thread

    def hand_over(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
        """Hand a bucket's gradients to the session; the future holds when the round is decided."""
        future = _future_on(bucket.buffer().device)
        current, local = self._round, self._session.local
        indices = [self._index[id(parameter)] for parameter in bucket.parameters()]
        reached = self._accumulation.used
        used = [reached is None or index in reached for index in indices]
        if local is not None:
            # Whatever has failed elsewhere: the processes of this host stay in step.
            local.mean(bucket.buffer())
            used = used if reached is None else local.any(used, bucket.buffer().device)
        with self._lock:
            failure = self._failure or self._session.failure
            if failure is None:
                current.waiting.append((future, bucket.buffer()))
                current.buckets.append(bucket.buffer())
        if failure is not None:
            _fail(future, failure)
        if bucket.is_last() and (failure is None or local is not None):
            # Not with the first bucket: under reentrant checkpointing that one may come in an inner backward, at whose end
            # nothing is decided yet. The parent queues its own callback right after this one.
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        if failure is not None:
            return future
        pushes = local is None or local.leads
        flat, start = bucket.buffer().detach(), 0
        for index, used_by_us, view in zip(indices, used, bucket.gradients(), strict=True):
            self._accumulation.keep_unused(index)
            current.views[index] = view
            factor = self._unscaling(index, current)
            if pushes:
                part = flat[start : start + view.numel()]
                start += view.numel()
                if self.tracked.takes_tensors:
                    # A scale is a power of two unless the script says otherwise: exact in half precision, too.
                    self.tracked.add(index, part if factor is None else part.mul_(factor), used=used_by_us)
                    continue
                host = HostGradient(part, factor=factor)
                current.hosts.append(host)
                self.tracked.add(index, host.array, used=used_by_us)
        if bucket.is_last() and self._buffers is not None and pushes:
            changed = self._buffers.gather()
            self.tracked.add(len(self.parameters), self._buffers.moving, used=changed and self.tracked.leads)
        return future

    def _unscaling(self, index: int, current: "_Round") -> torch.Tensor | None:
        """Return the factor that takes the loss scale out of a gradient; None where it has none."""
        scaler = self._session.training.scaler_of(self.parameters[index])
        if scaler is None:
            return None
        if id(scaler) not in current.scales:
            scale = scaler.scale(torch.ones((), device=self.parameters[index].device))
            current.scales[id(scaler)] = scale, scale.reciprocal()
        current.scaled[index], factor = current.scales[id(scaler)]
        return factor

    def _after_backward(self) -> None:
        # Callbacks run in the order in which they were queued, and the parent queues its own, which hands out the gradients,
        # later than ours: queue again, so as to come after it.
        if self._session.local is not None:
            self._share(self._session.local)
        torch.autograd.Variable._execution_engine.queue_callback(self._set_gradients)

    @torch.no_grad()
    def _share(self, local: LocalGroup) -> None:
        """Give the processes of this host what the round came to, or that it failed."""
        current, kind = self._round, "FAILED"
        if local.leads:
            try:
                kind = self.tracked.wait()
            except BaseException as error:  # whatever it is, the others of this host must not wait for it
                self._on_failure(error)
        buffers = 0 if self._buffers is None else 1
        device = self.parameters[0].device
        used = [index in current.used for index in range(len(self.parameters) + buffers)]
        which, multiplier, *flags = local.tell([KINDS.index(kind), self.tracked.batch_multiplier, *used])
        if KINDS[which] == "FAILED":
            if not local.leads:  # who does has the true cause already
                self._on_failure(RunAborted("the process of this host that pushes has failed; its own output says why"))
            return
        if not local.leads:
            self.tracked.follow(multiplier)
            current.decision = Decide(-1, KINDS[which], (), ())
            current.used = {index for index, flag in enumerate(flags) if flag}
        local.share(current.buckets)
        if self._buffers is not None:
            moving = torch.from_numpy(self._buffers.moving).to(device)
            local.share([moving])
            self._buffers.moving[:] = moving.cpu().numpy()
        if not local.leads:
            with self._lock:
                waiting, current.waiting = current.waiting, []
            for future, buffer in waiting:
                future.set_result(buffer)

    @torch.no_grad()
    def _set_gradients(self) -> None:
        """Make `p.grad` what the module promises, in every worker."""
        current, self._round, self._before_forward = self._round, _Round(), None
        used_here, bases = self._accumulation.finish()
        if current.decision is None:
            return
        for index, parameter in enumerate(self.parameters):
            view = current.views[index]
            if parameter.grad is None and not self._as_views:
                view = view.clone()  # the parent insists that no gradient is a view then
            if current.decision.kind == "SKIP":
                here = parameter.grad if parameter.grad is not None else view
                parameter.grad = _skipped(here, bases.get(index), scaled=index in current.scaled)
            elif index not in current.used:
                if parameter.grad is not None:
                    parameter.grad.copy_(bases[index])
            else:
                if parameter.grad is None:
                    parameter.grad = view
                elif used_here is not None and index not in used_here and parameter.grad.data_ptr() != view.data_ptr():
                    # The parent leaves alone what was not used here; without views of buckets the aggregate is not in it yet.
                    parameter.grad.copy_(view)
                if index in current.scaled:
                    parameter.grad.mul_(current.scaled[index])
                if index in bases:
                    parameter.grad.add_(bases[index])
            if parameter.grad is not None:
                self._accumulation.hand_out(index)
        if self._buffers is not None:
            moved = current.decision.kind == "DATA" and len(self.parameters) in current.used
            self._buffers.spread(moved=moved)

    # ------------------------------------------------------------ the thread that owns the sockets

    def _on_decided(self, decision: Decide) -> None:
        current = self._round
        current.decision = decision
        for key in self.tracked.layout.keys:
            for position, part in enumerate(key.slices):
                if decision.used[key.number] >> position & 1:
                    current.used.add(part.tensor)
        if decision.kind == "DATA":
            for host in current.hosts:
                host.write_back()
        with self._lock:  # a failure from now on must not touch futures that are done
            waiting, current.waiting = current.waiting, []
        for future, buffer in waiting:
            future.set_result(buffer)

    def _on_failure(self, error: BaseException) -> None:
        with self._lock:
            self._failure = error
            waiting, self._round.waiting = self._round.waiting, []
        for future, _ in waiting:
            _fail(future, error)


class _Round:
    """What one backward has handed over."""

    def __init__(self) -> None:
        self.waiting: list[tuple[torch.futures.Future[torch.Tensor], torch.Tensor]] = []
        self.buckets: list[torch.Tensor] = []
        self.views: dict[int, torch.Tensor] = {}
        self.hosts: list[HostGradient] = []
        self.scales: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Scale of each scaler's loss, and one over it."""
        self.scaled: dict[int, torch.Tensor] = {}
        self.used: set[int] = set()
        self.decision: Decide | None = None


def _hook(
    me: weakref.ref[Gradients],
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    gradients = me()
    assert gradients is not None, "a backward runs, so its model is there"
    return gradients.hand_over(bucket)


def _is_settled(me: weakref.ref[Gradients]) -> bool:
    """Whether every backward that handed over gradients has come to its end."""
    gradients = me()
    return gradients is None or not gradients._round.views


def _refuse_shared(named: list[tuple[str, nn.Parameter]], others: "list[Gradients]") -> None:
    taken = {id(parameter) for other in others for parameter in other.parameters}
    name = next((name for name, parameter in named if id(parameter) in taken), None)
    if name is not None:
        raise UsageError(
            f"parameter {name!r} belongs to another wrapped model of this session, whose rounds would overwrite its gradient; "
            "wrap one module that holds both models"
        )


def _take(me: weakref.ref[Gradients]) -> bytes:
    """Return the state after the last round, also in the middle of the next."""
    gradients = me()
    module = gradients.module if gradients is not None else None
    if gradients is None or module is None:
        return b""
    instead = dict(gradients._before_forward or {})
    if gradients._buffers is not None:
        instead |= gradients._buffers.agreed
    return snapshot.take(module, gradients._session.training, instead=instead)


def _rate_of(me: weakref.ref[Gradients]) -> float:
    gradients = me()
    return math.nan if gradients is None else gradients._session.training.rate(gradients._index)


def _call(me: weakref.ref[Gradients], method: str, argument: object) -> None:
    gradients = me()
    if gradients is not None:
        getattr(gradients, method)(argument)


def _skipped(here: torch.Tensor, base: torch.Tensor | None, *, scaled: bool) -> torch.Tensor | None:
    """Return what `p.grad` becomes when the round is skipped, with the memory of `here`."""
    if scaled:
        return here.fill_(float("inf"))
    # Zeros are what `zero_grad(set_to_none=False)` leaves, and would let momentum and weight decay move the parameter.
    return here.copy_(base) if base is not None and bool(base.any()) else None


def _future_on(device: torch.device) -> torch.futures.Future[torch.Tensor]:
    """Return a future for a tensor on `device`. One that knows its device makes the streams that use it wait for it."""
    return torch.futures.Future(devices=[device]) if device.type not in ("cpu", "meta") else torch.futures.Future()


def _fail(future: torch.futures.Future[torch.Tensor], error: BaseException) -> None:
    # torch carries only the text; the session raises the real error when it is left.
    future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))  # type: ignore[arg-type]  # torch's hint is wrong


def _row(name: str, parameter: nn.Parameter) -> Tensor:
    """Return a parameter's row in the tensor table, its dimensions in the order in which they lie in memory."""
    shape: Sequence[Any] = [parameter.shape[axis] for axis in order_in_memory(parameter)]
    return Tensor(name, tuple(shape), str(parameter.dtype).removeprefix("torch."))
