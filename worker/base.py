"""What a training script may ask of its session, with servers or without."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from ps_accordion.config import Settings
from ps_accordion.errors import UsageError
from ps_accordion.layout import Tensor

from .batches import Batch, MicroBatches
from .exchanging import Exchanging
from .joining import joined
from .meter import Counters
from .rounds import Decide
from .training import Training
from .transfer import StateBytes

if TYPE_CHECKING:
    from .gradients import Gradients
    from .local import LocalGroup

__all__ = ["BaseSession"]

MIN_WEIGHT, MAX_WEIGHT = 1e-9, 1e9
"""Far inside what float32 holds: the mean is computed in it."""


class BaseSession(ABC):
    """One worker's place in a run. A context manager; closing twice is harmless.

    Attributes:
        rank: This worker's rank, 0 to world_size - 1; one that came in addition may have a higher one.
        world_size: Number of workers that the run began with, also where more have come since or some have left.
        slot: This worker's place among those that push.
        training: What the script steps with.
    """

    rank: int
    slot: int
    world_size: int

    def __init__(self) -> None:
        self.training = Training(self.begin_epoch)
        self.closed = False
        """Whether this worker has left the run."""
        self.local: LocalGroup | None = None
        """Processes of this host that act as one worker with this one; None where it is a worker of its own."""
        self.came_in_at: int | None = None
        """Step at which this worker has come into the run in the middle; None where it has not, since somebody looked last."""
        self._models: list[weakref.ref[Gradients]] = []
        self._weight = 1.0

    # ------------------------------------------------------------ about the run

    @property
    @abstractmethod
    def settings(self) -> Settings:
        """The settings of the job, with the terms that the coordinator gave."""

    @property
    @abstractmethod
    def run_directory(self) -> Path | None:
        """Where this run leaves its records; None where it leaves none."""

    @property
    def members(self) -> tuple[int, ...]:
        """Ranks of the workers that make the rounds now, in order. It changes when one comes or goes."""
        return tuple(range(self.world_size))

    @property
    @abstractmethod
    def counters(self) -> Counters:
        """What this worker has moved and done so far."""

    @property
    @abstractmethod
    def exchanges(self) -> list[Exchanging]:
        """The layouts of this session, by number."""

    # ------------------------------------------------------------ what a script says

    def track(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: Any = None,
        scaler: torch.amp.GradScaler | None = None,
        sampler: Any = None,
    ) -> None:
        """Let the run see what the script steps with.

        Args:
            optimizer: Its learning rate tells the policy when a drop makes every tensor critical. After `join`, workers that
                ran out of data take over its state.
            scheduler: The scheduler that sets the rate. It is read when a step begins, after `scheduler.step()`.
            scaler: The GradScaler of its loss. Gradients are unscaled before they leave; an overflow in one worker skips the
                round in all of them, and every scale backs off alike.
            sampler: A sampler with `set_epoch`; each call then marks the beginning of an epoch, as `begin_epoch` does.

        Raises:
            UsageError: The scheduler is another optimizer's, the sampler has no epochs, or the optimizer has momentum where
                the job gives it to gradients before they are compressed (codec dgc).
        """
        self.training.track(optimizer, scheduler=scheduler, scaler=scaler, sampler=sampler)

    @abstractmethod
    def begin_epoch(self, epoch: int) -> None:
        """Mark the beginning of an epoch: where a window of the regime is counted in epochs, it ends here."""

    @abstractmethod
    def log(self, **values: float) -> None:
        """Attach numbers to the metrics of the step that was just made: `session.log(loss=loss.item(), accuracy=0.97)`."""

    def weigh(self, weight: float) -> None:
        """Let this worker's gradients count `weight` in the mean, from the next round on.

        With `session.weigh(len(batch))` before each backward, and a loss that is the mean over the batch, workers with batches of
        different sizes get the mean over all samples. Without it every worker counts 1, as under DistributedDataParallel.

        Args:
            weight: 1e-9 to 1e9. Only proportions between workers matter.

        Raises:
            UsageError: The weight is out of range.
        """
        if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            raise UsageError(
                f"expected a weight from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}, got {weight!r}; a worker without data uses join()"
            )
        self._weight = float(weight) * (1 if self.local is None else self.local.size)
        for exchange in self.exchanges:
            exchange.weigh(self._weight)

    @contextlib.contextmanager
    def busy(self, what: str = "busy") -> Iterator[None]:
        """Say that this worker does something else for a while: `with session.busy("evaluation"): ...`.

        The others wait for it meanwhile, and the run's progress line says for whom and why.

        Args:
            what: One or two words; more than 64 characters are cut off.
        """
        self._say_busy(what[:64] or "busy")
        try:
            yield
        finally:
            self._say_busy("")

    @abstractmethod
    def _say_busy(self, what: str) -> None:
        """Tell the coordinator; an empty text means that this worker goes on."""

    @contextlib.contextmanager
    def join(self, *, divide_by_initial_world_size: bool = True) -> Iterator[None]:
        """Let workers have different numbers of batches: put the training loop into this context.

        A worker that leaves the block waits there until all have. The others go on without it; then those that left early take
        over parameters, buffers and the state of known optimizers from one of the last, so that all go on alike.

        Args:
            divide_by_initial_world_size: Whether a missing gradient counts as zero in the mean (as it does by default under
                DistributedDataParallel), or not at all.
        """
        yield
        if self.local is not None:
            raise UsageError("join() does not know local groups; give every process of a host the same number of batches")
        joined(self, self.models, self.exchanges, divide_by_initial_world_size=divide_by_initial_world_size)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what this worker keeps beside the model: its residuals, as `<layout>.<tensor>`, float32 on the CPU; copies.

        With codec dgc also the momentum of its gradients, as `velocity.<layout>.<tensor>`.
        To be saved with the model, by every worker its own, between two steps. Empty where nothing was left out so far.

        Raises:
            UsageError: A round is open.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_dict` returned, after the same models were wrapped in the same order.

        The number of servers may be another.

        Raises:
            UsageError: It does not fit the models of this session, or a round is open.
        """
        if state:
            raise UsageError(f"expected an empty state, got {len(state)} residuals: this process sends nothing, so it keeps none")

    def checkpoint(self) -> Path:
        """Write the state of the whole job to the disk, and return where it is once it is complete.

        Called between two steps, after `optimizer.step()` and `scheduler.step()`, by every worker at the same step. `steps` does
        it by itself where `checkpoint.every_steps` is set. A run that is started with `--resume` goes on from it bit for bit.

        Raises:
            StorageError: It cannot be made. The one before is still there, and the run can go on.
            UsageError: A round is open, or this process is in no run with servers.
        """
        raise UsageError(
            "checkpoint() needs a run with servers, whose workers are one process each; save the model with torch.save"
        )

    def _checkpoint_if_due(self, step: int) -> None:  # noqa: B027  # who has no servers makes no checkpoints
        """Make a checkpoint if `checkpoint.every_steps` says so, and none was made at this step."""

    def take_part(self) -> None:
        """Come into the run's rounds where they stand, if this worker came late or was taken out; else do nothing.

        A wrapped model calls this before its forward, and `steps` before the first step. It may wait for a place, and puts the
        state of a worker that trains in the place of that of the models here and of what steps them.
        """
        return

    # ------------------------------------------------------------ loops

    def steps(self, total: int | None = None) -> Iterator[int]:
        """Yield the numbers of the steps that this worker has to make, from where the run stands.

        A worker that comes late, or was taken out of the run and comes back, goes on with the step that the others make: so all
        make the last one together. A step is a round of the first model.

        Args:
            total: Number of steps of the whole run; None never ends.
        """
        step = self.first_step
        while total is None or step < total:
            self._checkpoint_if_due(step)
            self.came_in_at = None
            yield step
            if self.closed:
                return
            # Where this worker came back within the step, the step was that of the others' round.
            step = 1 + (step if self.came_in_at is None else self.came_in_at)
            self.came_in_at = None
            self.take_part()
            step = step if self.came_in_at is None else self.came_in_at
        self._checkpoint_if_due(step)

    @property
    def first_step(self) -> int:
        """The step at which this worker begins; 0 unless it takes up a run that others, or an earlier process, have begun."""
        return 0

    def accumulate(self, loader: Iterable[Batch]) -> Iterator[MicroBatches[Batch]]:
        """Yield what each optimizer step takes: as many batches as the plan says.

        One while the regime is critical, `regime.batch_multiplier` elsewhere (Accordion's mode for batch sizes). While the
        optimizer steps, its learning rate is multiplied by the number of batches: the linear scaling rule.

            for batches in session.accumulate(loader):
                optimizer.zero_grad()
                for x, y in batches:  # gradients travel with the last one only
                    (loss_of(model(x), y) / len(batches)).backward()
                optimizer.step()

        Args:
            loader: Yields batches. What is left at its end and fills no step is left out, as with `drop_last`: rates must be the
                same in every worker.

        Raises:
            UsageError: The loader has fewer batches than one step takes.
        """
        batches, steps = iter(loader), 0
        while chunk := list(itertools.islice(batches, size := self.batch_multiplier)):
            if len(chunk) < size and not steps:
                raise UsageError(
                    f"expected at least {size} batches, which one step takes now, and the loader has {len(chunk)}; "
                    "lower regime.batch_multiplier"
                )
            if len(chunk) < size:
                return
            steps += 1
            self.training.multiplier = size
            try:
                yield MicroBatches(chunk, self.models)
            finally:
                self.training.end_step()

    @property
    def batch_multiplier(self) -> int:
        """Batches that the next optimizer step takes, as the plan in force says."""
        return max((model.tracked.batch_multiplier for model in self.models), default=1)

    # ------------------------------------------------------------ what the wrapper asks

    @property
    def models(self) -> list[Gradients]:
        """The models of this session that are alive."""
        return [model for ref in self._models if (model := ref()) is not None]

    def add_model(self, model: Gradients) -> None:
        """Note a model of this session, as long as it lives."""
        self._models.append(weakref.ref(model))

    @abstractmethod
    def open_layout(
        self,
        table: list[Tensor],
        *,
        decided: Callable[[Decide], None] | None = None,
        state: StateBytes | None = None,
        device: torch.device | None = None,
    ) -> Exchanging:
        """Declare a layout together with all other workers, and return its exchange.

        Args:
            table: The tensors, in order of registration.
            decided: Called, on the socket's thread, when a round is decided in which this worker trained.
            state: Memory that all workers shall start from as the lowest slot has it; filled when this returns.
            device: Where the gradients will lie; None for arrays of the host.

        Raises:
            UsageError: There are too many layouts, or the device is none that gradients can be on.
            CodecError: The codec of the job has no form for the device.
            JoinRefused: Another worker declared other tensors.
        """

    @property
    @abstractmethod
    def is_donor(self) -> bool:
        """Whether this worker's parameters and buffers are the ones that all start from."""

    @property
    @abstractmethod
    def failure(self) -> BaseException | None:
        """Why the run has failed, if it has."""

    @abstractmethod
    def on_failure(self, callback: Callable[[BaseException], None]) -> None:
        """Call `callback`, on another thread, when the run fails, or at once if it has."""

    @abstractmethod
    def hand_out(self, exchange: int, blob: bytes) -> None:
        """Keep `blob` for those who ask for the state after the join that was just decided."""

    @abstractmethod
    def fetch(self, exchange: int, donor: int) -> bytes:
        """Return what `donor` handed out after the join that was just decided."""

    # ------------------------------------------------------------ the end

    def __enter__(self) -> Self:
        return self

    def leave(self) -> None:
        """Leave the run while the others go on, between two steps. Nothing is lost: what this worker has not sent goes first.

        It travels with the next round of the others, in which this worker has no gradient of its own: that counts as zeros, as in
        `join`. The session is closed then, and `steps` ends. Where it is killed before, its residual is lost, and named in the
        ledger. SIGTERM does this when the step is done, and ends the process with 0.

        Raises:
            UsageError: A round is open, there is no model yet, this process is one of several that act as one worker, or others
                wait in `join` for the state that this worker alone has.
            PsAccordionError: The run has failed.
        """
        self.close()

    @abstractmethod
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the run."""

    @abstractmethod
    def close(self, error: BaseException | None = None) -> None:
        """Leave the run. Without an error this waits until every worker has finished."""

    @abstractmethod
    def push_pull(self, tensor: torch.Tensor, *, name: str) -> torch.Tensor:
        """Replace `tensor` by its mean over all workers; see `Session.push_pull`."""
