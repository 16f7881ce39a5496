"""A worker's part in a checkpoint of the whole job, and how it takes one up.

Every worker writes what it has for itself: residuals, velocities, sums of the open window, generators. The lowest slot writes
what all have: the models, each in a file of its own by parameter name, and what steps them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors.torch import load, save

from ps_accordion import checkpoint
from ps_accordion.errors import StorageError, UsageError
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Send

from .member import COORDINATOR
from .own_state import VELOCITY, load_residuals, load_velocities, residuals_of, velocities_of
from .rounds import Standing

if TYPE_CHECKING:
    from .session import Session
    from .tracked import Tracked

__all__ = ["Checkpoints"]

MODEL = "model."
"""What names of parameters and buffers begin with in the state of a model."""
RESIDUAL = "residual."
TRAINING = "training.safetensors"
VALUES = "values"
REPEAT_S = 0.5
"""How often the coordinator is told again that a part is on the disk."""


class Checkpoints:
    """What a session saves and takes up.

    Args:
        session: The session, whose settings are complete.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._kept: m.Kept | None = None
        self._said: m.Saved | None = None
        self._due = 0.0
        self._tries: dict[int, int] = {}
        self._path = Path(session.settings.checkpoint.resume) if session.settings.checkpoint.resume else None
        self._manifest = checkpoint.read(self._path) if self._path is not None else None
        self._taken: set[int] = set()
        self._files: dict[str, dict[str, torch.Tensor]] = {}
        self.last_step = -1 if self._manifest is None else self._manifest.step
        """Step of the last checkpoint that this worker has made or taken up; -1 before any."""

    # ------------------------------------------------------------ saving

    def save(self, tracked: list[Tracked]) -> Path:
        """Write this worker's part, between two steps, and wait until the checkpoint is complete.

        Raises:
            StorageError: It is not; the run can go on.
            UsageError: There is no directory for it.
        """
        session, settings = self._session, self._session.settings
        if not settings.checkpoint_directory:
            raise UsageError("a checkpoint needs a place: set checkpoint.directory, or run.directory, in every process alike")
        client, membership = session.client, session.client.membership
        step = tracked[0].exchange.rounds.round if tracked else 0
        client.wait(lambda: all(each.all_heard for each in tracked), "the coordinator to hear what was measured")
        standings = [(each.exchange.number, each.last_round + 1, each.exchange.rounds.previous_skipped) for each in tracked]
        parts: list[tuple[str, int, str]] = []
        error = checkpoint.lacking(session.members, settings.workers.count)
        try:
            for file, data in self._parts(tracked) if not error else []:
                part = checkpoint.write_part(checkpoint.partial(Path(settings.checkpoint_directory), step), file, data)
                parts.append((part.file, part.nbytes, part.digest))
        except StorageError as failure:
            error = str(failure)[: m.MAX_TEXT]
        self._kept, self._due = None, 0.0
        attempt = self._tries.get(step, 0)
        self._tries = {step: attempt + 1}
        self._said = m.Saved(False, session.slot, membership.incarnation, step, standings, parts, error, attempt)
        while not self._answered(step, attempt):
            for each in tracked:
                each.hand_out()  # a worker that joins now needs the state, and is waited for
            if client.error is not None:
                raise client.error
            if not membership.member:
                self._said = None
                raise StorageError(f"no checkpoint of step {step}: this worker was taken out of the run meanwhile")
            client.notice(0.1)
        self._said = None
        self.last_step = step
        assert self._kept is not None
        if self._kept.error:
            raise StorageError(f"no checkpoint of step {step}: {self._kept.error}")
        return Path(self._kept.path)

    def _answered(self, step: int, attempt: int) -> bool:
        return self._kept is not None and (self._kept.step, self._kept.attempt) == (step, attempt)

    def on_kept(self, kept: m.Kept) -> None:
        """Take in what has become of a checkpoint; on the socket's thread."""
        self._kept = kept

    def tick(self) -> None:
        """Tell the coordinator until it answers; on the socket's thread."""
        now, said = time.monotonic(), self._said
        if said is not None and now >= self._due:
            self._due = now + REPEAT_S
            self._session.client.carry([Send((COORDINATOR,), said)])

    def _parts(self, tracked: list[Tracked]) -> list[tuple[str, bytes]]:
        session = self._session
        parts = [(checkpoint.worker_file(session.slot), _own_state(tracked))]
        view = session.client.membership.view
        if view is None or view.members[0][0] != session.slot:
            return parts
        training: dict[str, torch.Tensor] = {}
        for each in tracked:
            if not (blob := each.take()):
                continue
            tensors = load(blob)
            model = {name.removeprefix(MODEL): tensor for name, tensor in tensors.items() if name.startswith(MODEL)}
            number = each.exchange.number
            parts.append((f"model-{number}.safetensors", save(model)))
            training |= {f"{number}.{name}": tensor for name, tensor in tensors.items() if not name.startswith(MODEL)}
        return [*parts, (TRAINING, save(training))]

    # ------------------------------------------------------------ taking up

    @property
    def owed(self) -> bool:
        """Whether the session goes on from a checkpoint that has a layout which this worker has not taken up."""
        manifest = self._manifest
        return manifest is not None and any(layout.number not in self._taken for layout in manifest.layouts)

    def take_up(self, tracked: list[Tracked]) -> None:
        """Put the checkpoint's state in the place of that of every layout which has begun no round, and is in the checkpoint.

        Raises:
            StorageError: The checkpoint is damaged.
            UsageError: Other optimizers step the model than when it was made.
        """
        manifest, path = self._manifest, self._path
        if manifest is None or path is None:
            return
        for each in tracked:
            number = each.exchange.number
            at = manifest.layout(number)
            if at is None or number in self._taken:
                continue
            self._taken.add(number)
            if each.last_round >= 0 or at.round == 0:
                continue  # it has come into the run where the others were by then
            self._apply_model(each, number)
            self._apply_own(each, number)
        if not self.owed:
            self._files.clear()
            line = f"going on from {path}, step {manifest.step}, {manifest.nbytes / 1e6:.1f} MB"
            self._session.client.events.write(event="resumed", path=str(path), step=manifest.step)
            if self._session.is_donor:
                print(f"ps-accordion: {line}", file=sys.stderr, flush=True)

    def _apply_model(self, tracked: Tracked, number: int) -> None:
        assert self._manifest is not None
        if any(part.file == f"model-{number}.safetensors" for part in self._manifest.parts):
            model = {f"{MODEL}{name}": tensor for name, tensor in self._file(f"model-{number}.safetensors").items()}
            prefix = f"{number}."
            training = self._file(TRAINING).items()
            tracked.apply(save(model | {name.removeprefix(prefix): each for name, each in training if name.startswith(prefix)}))

    def _apply_own(self, tracked: Tracked, number: int) -> None:
        mine = self._file(checkpoint.worker_file(self._session.slot))
        values = json.loads(bytes(mine[VALUES].tolist()))[str(number)]
        exchange = tracked.exchange
        load_residuals(exchange, _named(mine, f"{RESIDUAL}{number}."))
        load_velocities(exchange, _named(mine, f"{VELOCITY}{number}."))
        for coder in exchange.coders:
            first = coder.key.slices[0]
            # Small keys may be cut otherwise here; they have one level, so that no bound tells of a switch.
            coder.bound = 0 if coder.key.small else values["bounds"].get(f"{first.tensor}.{first.start}", 0)
        tracked.restore(values["tracked"], mine[f"sums.{number}"])
        standing = msgspec.convert(values["standing"], Standing)
        session = self._session
        session.client.run(lambda: exchange.admit(standing, session.client.membership.incarnation, missed=False))
        if number == 0:
            torch.set_rng_state(mine["random.cpu"])
            for name, state in mine.items():
                if name.startswith("random.cuda."):
                    torch.cuda.set_rng_state(state, int(name.removeprefix("random.cuda.")))

    def _file(self, file: str) -> dict[str, torch.Tensor]:
        assert self._manifest is not None
        assert self._path is not None
        if file not in self._files:
            part = checkpoint.part_named(self._manifest, file, where=self._path)
            self._files[file] = load(checkpoint.read_part(self._path, part))
        return self._files[file]


def _named(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _own_state(tracked: list[Tracked]) -> bytes:
    tensors: dict[str, torch.Tensor] = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no hints here
        tensors |= {f"random.cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    values: dict[str, Mapping[str, Any]] = {}
    for each in tracked:
        exchange, number = each.exchange, each.exchange.number
        tensors |= {f"{RESIDUAL}{number}.{name}": residual for name, residual in residuals_of(exchange).items()}
        tensors |= {f"{VELOCITY}{number}.{name}": velocity for name, velocity in velocities_of(exchange).items()}
        state, tensors[f"sums.{number}"] = each.state()
        first = [(coder, coder.key.slices[0]) for coder in exchange.coders]
        values[str(number)] = {
            "standing": msgspec.to_builtins(exchange.standing),
            "bounds": {f"{part.tensor}.{part.start}": coder.bound for coder, part in first},
            "tracked": state,
        }
    tensors[VALUES] = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    return save(tensors)
