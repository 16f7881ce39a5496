"""What the tests of the state machines share: a small job, its layout, and members that push."""

from __future__ import annotations

from typing import Any

import numpy as np

from ps_accordion import config
from ps_accordion.config import Settings
from ps_accordion.layout import Layout, Tensor
from ps_accordion.regimes import Choice, Plan
from ps_accordion.regimes.plan import encode_plan
from ps_accordion.selection import lay_out
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Note, Send
from ps_accordion.worker.coder import KeyCoder

__all__ = [
    "BOOT",
    "BUFFERED",
    "TABLE",
    "Member",
    "Pushed",
    "gaussian",
    "layout_of",
    "named",
    "notes",
    "plan_bytes",
    "sends",
    "settings_of",
    "view_of",
]

BOOT = 77
TABLE = [
    Tensor("weight", (64, 64), "float32"),
    Tensor("bias", (10,), "float32"),
    Tensor("scale", (7,), "float32"),
]
"""Three keys at 2,048 elements a partition: key 0 is scale and bias fused, keys 1 and 2 are the halves of weight."""
BUFFERED = [*TABLE, Tensor("running", (3000,), "float32", buffer=True)]
"""The same with buffers: keys 0 and 1 are theirs, the others follow."""

Pushed = tuple[m.Push, tuple[memoryview, ...]]


def settings_of(**options: Any) -> Settings:
    """Return settings without an environment; underscores in option names stand for the first dot: `workers_count=3`."""
    base = {"workers.count": 2, "servers.count": 1, "layout.partition_elements": 2048, "codec.light": 0.1, "codec.heavy": 0.01}
    given = {name.replace("_", ".", 1): value for name, value in options.items()}
    return config.load(environment={}, overrides=base | given)


def layout_of(settings: Settings, table: list[Tensor] | None = None) -> Layout:
    """Return the layout of the small model under these settings."""
    return lay_out(table or TABLE, settings)


def view_of(settings: Settings, *, p: int = 1, slots: list[int] | None = None, **fields: Any) -> m.View:
    """Return a view of all workers (slot s has incarnation s + 1) and all shards (with boot BOOT)."""
    slots = list(range(settings.workers.count)) if slots is None else slots
    base: dict[str, Any] = {
        "p": p,
        "members": [(slot, slot + 1) for slot in slots],
        "cuts": [],
        "shards": [(number, BOOT, f"tcp://127.0.0.1:{5000 + number}") for number in range(settings.num_shards)],
        "restore": [],
        "donor": slots[0],
        "removed": [],
    }
    return m.View(**(base | fields))


def gaussian(n: int, *seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return float32[n] of standard normal numbers that follow from `seed`."""
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


class Member:
    """A worker's side of every key: pushes as the real one makes them."""

    def __init__(self, slot: int, settings: Settings, layout: Layout, number: int = 0) -> None:
        self.slot = slot
        self.peer = f"peer {slot}".encode()
        self.settings = settings
        self.layout = layout
        self.coders = [KeyCoder(number, key, settings, slot=slot, incarnation=slot + 1) for key in layout.keys]

    def data(
        self,
        key: int,
        round_: int,
        *,
        gradient: Any = None,
        used: int | None = None,
        skipped: bool = False,
        choice: Choice | None = None,
        weight: float = 1.0,
    ) -> Pushed:
        """Return a push of a gradient, which is drawn from slot, key and round unless it is given."""
        part = self.layout.keys[key]
        if gradient is None:
            gradient = gaussian(part.elements, self.slot, key, round_)
        if choice is None and part.buffer:
            choice = Choice("dense", 32.0)
        elif choice is None:
            codec = self.settings.codec
            row = codec.of(self.layout.tensors[part.tensor].name)
            choice = Choice("dense", float(codec.small_bits)) if part.small else Choice(row.codec, row.light)
        used = part.all_used if used is None else used
        pushed = self.coders[key].encode(
            gradient, round_=round_, used=used, choice=choice, previous_skipped=skipped, weight=weight
        )
        return pushed.message, (pushed.payload.data,) if pushed.payload is not None else ()

    def bare(self, kind: m.PushKind, key: int, round_: int, *, skipped: bool = False, weight: float | None = None) -> Pushed:
        """Return a push without a payload; without a weight, as a worker weighs it that counts 1 where it has no gradient."""
        if weight is None:
            weight = 0.0 if self.layout.keys[key].buffer else 1.0
        return self.coders[key].without_payload(kind, round_=round_, previous_skipped=skipped, weight=weight), ()


def sends(actions: Any, kind: type[m.Message] | None = None) -> list[Send]:
    """Return the messages among `actions`, of one kind."""
    return [each for each in actions if isinstance(each, Send) and (kind is None or isinstance(each.message, kind))]


def notes(actions: Any, event: str) -> list[dict[str, Any]]:
    """Return the fields of the log entries of one kind."""
    return [each.fields for each in actions if isinstance(each, Note) and each.event == event]


def named(actions: Any) -> list[str]:
    """Return the names of the messages among `actions`, in order."""
    return [type(each.message).__name__ for each in sends(actions)]


def plan_bytes(
    version: int, *choices: Choice, expires_round: int = 10_000, tensors: int = len(TABLE), batch_multiplier: int = 1
) -> bytes:
    """Return a plan as it travels, with one choice a tensor (the last one is repeated)."""
    choices = (choices + (choices[-1],) * tensors)[:tensors]
    return encode_plan(Plan(version, choices, (False,) * tensors, expires_round, batch_multiplier))
