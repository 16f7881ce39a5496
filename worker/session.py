"""A worker's part in a run that has servers."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import torch

from ps_accordion.codecs import warm
from ps_accordion.config import Settings
from ps_accordion.errors import PsAccordionError, RunAborted, StorageError, UsageError
from ps_accordion.layout import Tensor
from ps_accordion.selection import lay_out, unmatched, used
from ps_accordion.telemetry.events import JsonLines
from ps_accordion.telemetry.trace import Trace
from ps_accordion.wire import messages as m
from ps_accordion.wire.transport import Transport

from .base import BaseSession
from .checkpoint import Checkpoints
from .client import Client
from .entry import Entry, over_is_fine
from .exchanging import Exchanging
from .handover import packed, unpacked
from .interrupt import Interrupts
from .leaving import hand_over, leave_with
from .meter import Counters, Meter
from .own_state import load_state, state_of
from .record import Record
from .rounds import Decide
from .tracked import Tracked
from .transfer import START, Blob, Donor, StateBytes

__all__ = ["Session"]


class Session(BaseSession):
    """One worker in a run; see `BaseSession` for what a script does with it.

    Args:
        settings: Settings of the job, as far as this process knows them.
        rank: The rank to ask for; -1 for any.
        threads: Codec threads.
        transport: Sockets to use, for tests; None makes new ones.
        restart: How often whoever started this process has started it again.

    Raises:
        Unreachable: No coordinator answered, or others did not join, within `timeouts.join`.
        JoinRefused: The coordinator said no.
    """

    def __init__(
        self, settings: Settings, *, rank: int, threads: int, transport: Transport | None = None, restart: int = 0
    ) -> None:
        super().__init__()
        self._client = Client(settings, slot=rank, threads=threads, transport=transport, restart=restart)
        self.meter = Meter(self._client)
        self._exchanges: list[Tracked] = []
        self._client.on_tick(self._tick)
        self._client.on_heard(self._heard)
        self._client.on_wanted(self._wanted)
        self._client.on_kept(lambda kept: self._checkpoints.on_kept(kept) if self._checkpoints is not None else None)
        self._checkpoints: Checkpoints | None = None
        self._names: dict[str, Tracked] = {}
        self._interrupts = Interrupts(self._client, self._may_leave)
        self._entry = Entry(self._client, restarted=restart > 0)
        try:
            # What this process knows of the job, meanwhile; a worker that was told little learns the rest from the coordinator.
            warm(used(settings.codec))
            membership = self._client.membership
            join = settings.timeouts.join
            self._client.wait(lambda: membership.joined, f"the coordinator at {settings.coordinator.address}", join + 1)
            if self.settings.codec != settings.codec:
                warm(used(self.settings.codec))
            self._client.wait(lambda: membership.inside, "the other workers and the servers to join", join + 1)
            self.rank = self.slot = membership.slot
            self.world_size = self.settings.workers.count
            self._write_to(self.settings.run.directory)
            self._checkpoints = Checkpoints(self)
        except BaseException as error:
            self._end(error)
            raise
        atexit.register(self._at_exit)

    # ------------------------------------------------------------ what a script asks

    @property
    def settings(self) -> Settings:
        """The settings of the job, with the terms that the coordinator gave."""
        return self._client.settings

    @property
    def run_directory(self) -> Path | None:
        """Where this run leaves its records; None where it leaves none."""
        directory = self.settings.run.directory
        return Path(directory) if directory else None

    @property
    def counters(self) -> Counters:
        """What this worker has moved and done so far."""
        return self.meter.counters

    @property
    def exchanges(self) -> list[Exchanging]:
        """The layouts of this session, by number."""
        return list(self._exchanges)

    @property
    def members(self) -> tuple[int, ...]:
        """Ranks of the workers that make the rounds now; see `BaseSession.members`."""
        view = self._client.membership.view
        return () if view is None else tuple(slot for slot, _ in view.members)

    @property
    def client(self) -> Client:
        """Sockets and threads, for the wrapper."""
        return self._client

    def begin_epoch(self, epoch: int) -> None:
        """Mark the beginning of an epoch: where a window of the regime is counted in epochs, it ends here."""
        for tracked in self._exchanges:
            tracked.begin_epoch(epoch)

    def _say_busy(self, what: str) -> None:
        membership = self._client.membership
        self._client.call(lambda: membership.say_busy(what))

    def log(self, **values: float) -> None:
        """Attach numbers to the metrics of the step that was just made: `session.log(loss=loss.item(), accuracy=0.97)`."""
        self.meter.log({name: float(value) for name, value in values.items()})
        if "loss" in values:
            for tracked in self._exchanges:
                tracked.loss(float(values["loss"]))

    def push_pull(self, tensor: torch.Tensor, *, name: str) -> torch.Tensor:
        """Replace `tensor` by its mean over all workers, compressed both ways as the configuration says.

        Args:
            tensor: float32, contiguous, on the CPU; overwritten in place. Every worker calls this with the same name and shape.
            name: Names the tensor over the rounds: its residual and its statistics belong to the name.

        Returns:
            The same tensor. If any worker's values were not finite, it is NaN throughout, in every worker.

        Raises:
            UsageError: Another type, device or memory layout.
        """
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise UsageError(
                f"push_pull({name!r}): expected a contiguous float32 tensor on the CPU, got {tensor.dtype} on {tensor.device} "
                f"with strides {tensor.stride()}; call .float().cpu().contiguous()"
            )
        self.take_part()
        tracked = self._names.get(name)
        if tracked is None:
            tracked = self._names[name] = self.open_layout([Tensor(name, tuple(tensor.shape), "float32")])
            self.take_part()
        flat = tensor.detach().reshape(-1).numpy()
        tracked.add(0, flat)
        if tracked.wait() == "SKIP":
            flat.fill(float("nan"))
        return tensor

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what this worker keeps beside the model; see `BaseSession.state_dict`."""
        self._refuse_open_rounds("state_dict() was called")
        self._client.codecs.drain()
        return state_of(tracked.exchange for tracked in self._exchanges)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_dict` returned; see `BaseSession.load_state_dict`."""
        self._refuse_open_rounds("load_state_dict() was called")
        self._client.codecs.drain()
        load_state([tracked.exchange for tracked in self._exchanges], state)

    # ------------------------------------------------------------ what the wrapper asks

    def open_layout(
        self,
        table: list[Tensor],
        *,
        decided: Callable[[Decide], None] | None = None,
        state: StateBytes | None = None,
        device: torch.device | None = None,
    ) -> Tracked:
        """Declare a layout together with all other workers, and return its exchange.

        Args:
            table: The tensors, in order of registration.
            decided: Called, on the socket's thread, when a round is decided.
            state: Memory that all workers shall start from as the lowest slot has it; filled when this returns.
            device: Where the gradients will lie; None for arrays of the host.

        Raises:
            UsageError: There are too many layouts, or the device is none that gradients can be on.
            CodecError: The codec of the job has no form for the device.
            JoinRefused: Another worker declared other tensors.
        """
        self.refuse_closed("a model or a push_pull name was added")
        settings = self.settings
        if len(self._exchanges) >= m.MAX_LAYOUTS:
            raise UsageError(f"expected at most {m.MAX_LAYOUTS} models and push_pull names in a session; reuse names")
        layout = lay_out(table, settings)
        number = len(self._exchanges)
        if decided is not None and self.rank == 0:
            known = [tensor for tracked in self._exchanges for tensor in tracked.exchange.layout.tensors]
            for text in unmatched(settings.codec, [*known, *table]):
                self._client.events.write(event="warning", reason=text)
                print(f"ps-accordion: {text}", file=sys.stderr, flush=True)
        tracked = Tracked(self, number, layout, decided, device)
        tracked.weigh(self._weight)
        if state is not None and self.is_donor:
            # Before the others can know that the layout is ready, and ask.
            self._entry.offer(Donor(number, START, state), number)
        tracked.exchange.starting = state is not None and not self.is_donor
        with over_is_fine(self._entry.restarted):
            self._client.open(number, layout, tracked.exchange)
        tracked.start = state if tracked.exchange.behind else None
        self._exchanges.append(tracked)
        if state is not None and not self.is_donor and not tracked.exchange.behind:
            view = self._client.membership.view
            assert view is not None
            self._entry.fetch(number, START, state, view.donor)
            state.write_back()
        tracked.exchange.starting = False
        return tracked

    @property
    def is_donor(self) -> bool:
        """Whether this worker's parameters and buffers are the ones that all start from."""
        view = self._client.membership.view
        return view is not None and view.donor == self._client.membership.slot

    @property
    def failure(self) -> BaseException | None:
        """Why the run has failed, if it has."""
        return self._client.error

    def on_failure(self, callback: Callable[[BaseException], None]) -> None:
        """Call `callback`, on the socket's thread, when the run fails, or at once if it has."""
        self._client.on_failure(callback)

    def hand_out(self, exchange: int, blob: bytes) -> None:
        """Keep `blob` for those who ask for the state after the join that was just decided, until the next round is."""
        tracked = self._exchanges[exchange]
        state = Blob(packed(tracked.exchange.standing, blob))
        self._entry.offer(Donor(exchange, tracked.last_round, state), exchange)

    def fetch(self, exchange: int, donor: int) -> bytes:
        """Return what `donor` handed out after the join that was just decided."""
        blob = Blob()
        self._entry.fetch(exchange, self._exchanges[exchange].last_round, blob, donor)
        return unpacked(blob.bytes())[1]

    def take_part(self) -> None:
        """Come into the run's rounds where they stand, if this worker came late or was taken out; see `BaseSession.take_part`."""
        if self.closed:
            return
        # Between two batches of one step there are gradients that have not been sent: the step is finished first.
        if not any(model.accumulates for model in self.models) and self._leave_if_asked():
            raise SystemExit(0)
        if self.local is not None and self._client.behind:
            raise RunAborted("this worker was taken out of the run, and workers of several processes cannot come back yet")
        came_in = self._entry.take_part(self._exchanges)
        self.came_in_at = self.came_in_at if came_in is None else came_in
        if self._checkpoints is not None and self._checkpoints.owed:
            self._checkpoints.take_up(self._exchanges)

    def checkpoint(self) -> Path:
        """Write the state of the whole job to the disk; see `BaseSession.checkpoint`."""
        if self.local is not None:
            raise UsageError(
                "checkpoint() does not know local groups yet: start one process a worker, or save the model by itself"
            )
        self.take_part()
        self.refuse_closed("checkpoint() was called")
        self._refuse_open_rounds("checkpoint() was called")
        self._client.codecs.drain()
        self._client.run(lambda: None)  # what the last round has left to do there is done
        assert self._checkpoints is not None
        return self._checkpoints.save(self._exchanges)

    def _checkpoint_if_due(self, step: int) -> None:
        every = self.settings.checkpoint.every_steps
        if not every or not step or step % every or self._checkpoints is None or self._checkpoints.last_step == step:
            return
        try:
            self.checkpoint()
        except StorageError as error:  # training is worth more than one checkpoint, and the one before is still there
            print(f"ps-accordion: {error}; going on without it", file=sys.stderr, flush=True)

    @property
    def first_step(self) -> int:
        """The step at which this worker begins: the open round of its first model, where the others stand."""
        self.take_part()
        return self._exchanges[0].exchange.rounds.round if self._exchanges else 0

    def _wanted(self, get: m.Get) -> None:
        if get.donor == self.slot and get.layout < len(self._exchanges):
            self._exchanges[get.layout].wanted(get)

    def _tick(self) -> None:
        for tracked in self._exchanges:
            tracked.tick()
        if self._checkpoints is not None:
            self._checkpoints.tick()

    def _heard(self, heard: m.Heard) -> None:
        if heard.layout < len(self._exchanges):
            self._exchanges[heard.layout].heard(heard.window)

    # ------------------------------------------------------------ the end

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        fine = error is None or (isinstance(error, SystemExit) and error.code in (None, 0))
        failure = self._client.error
        # The others are to hear of the cause, not of the shadow that torch makes of it.
        cause = failure if failure is not None and not isinstance(error, SystemExit) else error
        self.close(None if fine and failure is None else cause)
        if failure is not None and error is not failure and not isinstance(error, (KeyboardInterrupt, SystemExit)):
            # What backward raised is a shadow of this one: torch carries only text across its futures.
            raise failure from error

    def leave(self) -> None:
        """Leave the run while the others go on; see `BaseSession.leave`."""
        if self.closed:
            return
        if self.local is not None:
            raise UsageError("leave() does not know local groups yet: start one process a worker")
        if not self._exchanges:
            raise UsageError(
                "leave() was called before a model was wrapped: the others wait until this worker has one as they do; wrap it "
                "first, or end with an error, which ends the run"
            )
        self._refuse_open_rounds("leave() was called")
        if hand_over(self, [tracked.exchange for tracked in self._exchanges]):
            atexit.unregister(self._at_exit)
            self._end(None)
        else:
            self.close()

    def _leave_if_asked(self) -> bool:
        """Leave the run if SIGTERM has asked for it and no round is open; return whether it has."""
        if not self._interrupts.asked or self._client.error is not None or self._round_is_open():
            return False
        self._interrupts.asked = False
        self.leave()
        with contextlib.suppress(OSError):  # whoever reads that may have been ended first
            print("ps-accordion: this worker has left the run, and the others go on", file=sys.stderr, flush=True)
        return True

    def _may_leave(self) -> bool:
        client = self._client
        idle = any(tracked.exchange.rounds.idle == "EMPTY" for tracked in self._exchanges)
        healthy = client.error is None and client.membership.member
        return healthy and bool(self._exchanges) and not idle and self.local is None

    def close(self, error: BaseException | None = None) -> None:
        """Leave the run. Without an error this waits until every worker has finished.

        Raises:
            PsAccordionError: The run failed before all had finished.
        """
        if self.closed:
            return
        if error is None and self._leave_if_asked():
            return  # there is no further step, and no time to wait for those of the others
        atexit.unregister(self._at_exit)
        client = self._client
        try:
            if error is None:
                if client.error is not None:
                    raise client.error
                self._refuse_open_rounds("the session was left")
                for tracked in self._exchanges:
                    client.call(tracked.exchange.finish)
                # Who has not got the last results learns of the end all the same: they would change nothing.
                ours = client.membership
                client.wait(lambda: ours.over or all(tracked.exchange.rounds.ended for tracked in self._exchanges), "the end")
                client.codecs.drain()  # a last skipped round returns its payloads there
                account = client.accounting.close(tracked.exchange for tracked in self._exchanges)
                client.call(lambda: client.carry(account))
                # Only who has seen the rounds end may say that they have; the others go on without this worker then.
                alone = any(tracked.exchange.rounds.alone for tracked in self._exchanges)
                client.call(lambda: ours.leave_others([]) if alone else ours.leave("", 0))
                # Others may train for hours yet; who hears nothing of the coordinator for too long fails by itself.
                client.wait(lambda: ours.gone or ours.released, "the coordinator's goodbye")
        except BaseException as failure:  # Ctrl-C while waiting for the others, too
            error = failure
            raise
        finally:
            self._end(error)

    def refuse_closed(self, what: str) -> None:
        """Refuse what nobody would answer any more.

        Raises:
            UsageError: This worker has left its session.
        """
        if self.closed and self._client.error is None:
            raise UsageError(f"{what} after this worker had left its session; end the loop then, as session.steps does")

    def _round_is_open(self) -> bool:
        return any(tracked.exchange.is_open or not tracked.settled() for tracked in self._exchanges)

    def _refuse_open_rounds(self, when: str) -> None:
        for tracked in self._exchanges:
            if tracked.exchange.is_open or not tracked.settled():
                raise UsageError(
                    f"{when} in the middle of round {tracked.exchange.rounds.round}: "
                    "a backward began and did not end; was its exception caught and dropped?"
                )

    def _end(self, error: BaseException | None) -> None:
        self.closed = True
        self.training.close()
        client = self._client
        if client.membership.over:
            client.call(lambda: client.carry(client.membership.bye()))  # behind the account
        elif error is not None and client.membership.joined and not client.membership.gone:
            leave_with(client, error)
        self._interrupts.close()
        client.close()
        for tracked in self._exchanges:  # after the codec threads: a last skipped round returns its payloads there
            for key, residual in tracked.exchange.residuals():
                client.record.residual(tracked.exchange.number, key, residual)
        self.meter.close()

    def _at_exit(self) -> None:
        """Close when the script ends without having done so; an uncaught exception is told to the others."""
        error = getattr(sys, "last_value", None)
        try:
            self.close(error if self._client.error is None else self._client.error)
            failure = self._client.error
        except PsAccordionError as raised:
            failure = raised
        if failure is not None and error is None:
            # Python ignores what is raised here, and would end with 0.
            print(f"ps-accordion: {failure}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(failure.exit_code if isinstance(failure, PsAccordionError) else 1)

    def _write_to(self, directory: str) -> None:
        if not directory:
            return
        self._client.events = JsonLines.of_role(directory, "events", "worker", self.rank)
        self.meter.write_to(JsonLines.of_role(directory, "metrics", "worker", self.rank))
        if self.settings.run.trace:
            self._client.trace = Trace(directory, "worker", self.rank)
        if self.settings.run.record_gradients:
            self._client.record = Record(Path(directory) / "record" / f"worker-{self.rank}")
        self._client.events.write(event="join", slot=self.rank, incarnation=self._client.membership.incarnation)
