"""DistributedDataParallel whose gradients travel through our servers.

The parent does what it is good at (buckets, overlap with backward, `no_sync`, `state_dict`) over a group of one rank, which moves
nothing; a communication hook hands every bucket to the session.

This module has no postponed annotations: the parent reads those of the hook.
"""

import functools
import threading
import weakref
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ps_accordion.codecs.base import FloatVector
from ps_accordion.errors import UsageError
from ps_accordion.layout import Tensor

from .rounds import Decide
from .session import Session
from .transfer import StateBytes

__all__ = ["DistributedModel"]


class DistributedModel(DistributedDataParallel):
    """Wraps a model so that `backward` leaves the workers' mean gradient in `p.grad`, the same bits in every worker.

    Parameters and buffers of the lowest rank are copied to all when the wrapper is made.

    A round in which some worker's gradient was not finite is skipped by all: every `p.grad` is None after `backward`, so that an
    optimizer step changes nothing; the finite gradients of that round come with the next one.

    Args:
        module: The model, on one device.
        session: This worker's session.
        find_unused_parameters: As in DistributedDataParallel: set it when a step may leave parameters unused.
        **options: Other options of DistributedDataParallel, but `process_group`, `device_ids` and those about buffers.

    Raises:
        UsageError: The model cannot be trained this way.
        JoinRefused: Another worker holds a different model.
    """

    def __init__(self, module: nn.Module, *, session: Session, find_unused_parameters: bool = False, **options: Any) -> None:
        _refuse_what_cannot_work(module, options)
        options.setdefault("gradient_as_bucket_view", True)
        super().__init__(
            module,
            process_group=_group_of_one(),
            forward_sync_buffers=False,
            init_sync=False,
            find_unused_parameters=find_unused_parameters,
            **options,
        )
        named = [
            (name, parameter)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and name not in self.parameters_to_ignore
        ]
        self._session = session
        self._parameters_in_order = [parameter for _, parameter in named]
        self._index = {id(parameter): index for index, parameter in enumerate(self._parameters_in_order)}
        me = weakref.ref(self)
        self._tracked = session.open_layout(
            [_row(name, parameter) for name, parameter in named],
            decided=lambda decision: _call(me, "_on_decided", decision),
            state=_state_of(module, copy_buffers=session.is_donor),
        )
        self._round = _Round()
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._used: set[int] | None = None
        if find_unused_parameters:
            used = self._used = set[int]()
            for index, parameter in enumerate(self._parameters_in_order):
                note = functools.partial(
                    _note_used, used, index
                )  # holds no reference to us: parameters keep their hooks for good
                parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]  # torch has no hints here
        self._tracked.settled = lambda: _is_settled(me)
        session.client.on_failure(lambda error: _call(me, "_on_failure", error))
        # The parent's C++ half keeps the hook alive, out of sight of the garbage collector: it must not keep us.
        self.register_comm_hook(me, _hook)

    # ------------------------------------------------------------ backward's thread

    def _hand_over(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
        """Hand a bucket's gradients to the session; the future holds when the round is decided."""
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        current = self._round
        with self._lock:
            failure = self._failure or self._session.client.error
            if failure is None:
                current.waiting.append((future, bucket.buffer()))
        if failure is not None:
            _fail(future, failure)
            return future
        if bucket.is_last():
            # Not with the first bucket: under reentrant checkpointing that one may come in an inner backward, at whose end
            # nothing is decided yet. The parent queues its own callback right after this one.
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        flat, start = bucket.buffer().detach(), 0
        for parameter, view in zip(bucket.parameters(), bucket.gradients(), strict=True):
            index = self._index[id(parameter)]
            host = _Host(flat[start : start + parameter.numel()])
            start += parameter.numel()
            current.views[index] = view
            current.hosts.append(host)
            used = self._used is None or index in self._used
            self._tracked.add(index, host.array, used=used)
        return future

    def _after_backward(self) -> None:
        # Callbacks run in the order in which they were queued, and the parent queues its own, which hands out the gradients,
        # later than ours: queue again, so as to come after it.
        torch.autograd.Variable._execution_engine.queue_callback(self._set_gradients)

    def _set_gradients(self) -> None:
        """Make `p.grad` the same in every worker: the aggregate where anyone had a gradient, else None."""
        current, self._round = self._round, _Round()
        used_here = None if self._used is None else self._used.copy()
        if self._used is not None:
            self._used.clear()
        if current.decision is None:
            return
        for index, parameter in enumerate(self._parameters_in_order):
            if current.decision.kind == "SKIP" or index not in current.used:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = current.views[index]
            elif (
                used_here is not None and index not in used_here and parameter.grad.data_ptr() != current.views[index].data_ptr()
            ):
                # The parent leaves alone what was not used here; without views of buckets the aggregate is not in it yet.
                parameter.grad.copy_(current.views[index])

    # ------------------------------------------------------------ the thread that owns the sockets

    def _on_decided(self, decision: Decide) -> None:
        if decision.kind == "END":
            return
        current = self._round
        current.decision = decision
        for key in self._tracked.exchange.layout.keys:
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


def _hook(
    me: weakref.ref[DistributedModel],
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    model = me()
    assert model is not None, "a backward runs, so its model is there"
    return model._hand_over(bucket)


def _is_settled(me: weakref.ref[DistributedModel]) -> bool:
    """Whether every backward that handed over gradients has come to its end."""
    model = me()
    return model is None or not model._round.views


def _note_used(used: set[int], index: int, _: torch.Tensor) -> None:
    used.add(index)


def _call(me: weakref.ref[DistributedModel], method: str, argument: object) -> None:
    model = me()
    if model is not None:
        getattr(model, method)(argument)


class _Round:
    """What one backward has handed over."""

    def __init__(self) -> None:
        self.waiting: list[tuple[torch.futures.Future[torch.Tensor], torch.Tensor]] = []
        self.views: dict[int, torch.Tensor] = {}
        self.hosts: list[_Host] = []
        self.used: set[int] = set()
        self.decision: Decide | None = None


class _Host:
    """A flat gradient as float32 in host memory: the gradient itself where it lies there already, else a copy."""

    def __init__(self, gradient: torch.Tensor) -> None:
        self._gradient: torch.Tensor | None = None
        if gradient.device.type == "cpu" and gradient.dtype == torch.float32:
            self.array: FloatVector = gradient.numpy()
        else:
            self._gradient = gradient
            self.array = np.ascontiguousarray(gradient.float().cpu().numpy())

    def write_back(self) -> None:
        """Put the aggregate where the gradient was."""
        if self._gradient is not None:
            self._gradient.copy_(torch.from_numpy(self.array))


def _fail(future: torch.futures.Future[torch.Tensor], error: BaseException) -> None:
    # torch carries only the text; the session raises the real error when it is left.
    future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))  # type: ignore[arg-type]  # torch's hint is wrong


def _group_of_one() -> dist.ProcessGroup:
    """Return a group of this process alone. It is never the default group: a sampler would take the world for one replica."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # there, but not in torch's list of names
    group = dist.ProcessGroup(store, 0, 1)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the only way to name the interface
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(minutes=1)
    backend = dist.ProcessGroupGloo(store, 0, 1, options)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    return group


def _row(name: str, parameter: nn.Parameter) -> Tensor:
    """Return a parameter's row in the tensor table, its dimensions in the order in which they lie in memory."""
    order = sorted(range(parameter.dim()), key=lambda axis: -parameter.stride()[axis])
    return Tensor(name, tuple(parameter.shape[axis] for axis in order), str(parameter.dtype).removeprefix("torch."))


def _state_of(module: nn.Module, *, copy_buffers: bool) -> StateBytes:
    """Return the memory of all parameters, and copies of all buffers if this worker hands them out.

    Parameters stand still until the first round, for which all must have them; a forward may change buffers before.
    """
    buffers = [(name, buffer.clone() if copy_buffers else buffer) for name, buffer in module.named_buffers()]
    tensors = [*module.named_parameters(), *buffers]
    description = "\n".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors)
    return StateBytes([_bytes_of(name, tensor) for name, tensor in tensors if tensor.numel()], description)


def _bytes_of(name: str, tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    data = tensor.detach()
    if data.device.type != "cpu":
        raise UsageError(
            f"{name!r} lies on {data.device}: this release trains models on the CPU only; the device path is not ready yet"
        )
    order = sorted(range(data.dim()), key=lambda axis: -data.stride()[axis])
    flat = data.permute(order)
    if not flat.is_contiguous():
        raise UsageError(
            f"{name!r} does not lie in one piece of memory (strides {data.stride()}); call .contiguous() on it first"
        )
    return flat.reshape(-1).view(torch.uint8).numpy()


def _refuse_what_cannot_work(module: nn.Module, options: dict[str, Any]) -> None:
    for option in ("delay_all_reduce_named_params", "param_to_hook_all_reduce"):
        if option in options:
            raise UsageError(f"DistributedModel has no option {option!r}: every gradient goes through the hook; leave it out")
    for option in ("process_group", "device_ids", "broadcast_buffers", "forward_sync_buffers", "init_sync"):
        if option in options:
            raise UsageError(
                f"DistributedModel has no option {option!r}: it brings its own group and copies the initial state itself"
            )
    for name, parameter in module.named_parameters():
        if parameter.is_complex():
            raise UsageError(f"parameter {name!r} is complex; expected real parameters. Keep its real and imaginary parts apart")
    for name, child in module.named_modules():
        if getattr(child, "sparse", False) is True:
            raise UsageError(f"{name!r} makes sparse gradients; build it with sparse=False, which top-k compresses as well")
        if isinstance(child, nn.SyncBatchNorm):
            raise UsageError(
                f"{name!r} is a SyncBatchNorm, which needs a group of all workers; use BatchNorm, whose statistics stay local"
            )
