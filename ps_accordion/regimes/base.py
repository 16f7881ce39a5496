"""The contract of a policy: window reports in, levels out.

A policy sees what the members measured over a window of rounds and answers with a choice of (codec, level) for every tensor.
It has no clock, no socket and no randomness, so that the same reports give the same plans on every run.

The coordinator does the rest: it collects reports, gives plans their version and expiry, and hands them to the shard that
carries them (`coordinator/planning.py`). Statistics are taken at the workers before compression, because a server never sees
raw gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Choice", "Decision", "Plan", "Policy", "Window"]


class Choice(NamedTuple):
    """A codec and the level it works at."""

    codec: str
    level: float


@dataclass(frozen=True)
class Window:
    """What the members measured over one window, merged by the coordinator.

    Attributes:
        index: Number of the window, from 0.
        round: Last round of the window.
        norms: float64[members, tensors], not to be written to; row i is member i in slot order. Buffers have no column.
            Each entry is the L2 norm of the *vector sum* of that worker's raw local gradients over the window.
            NaN where a member did not report.
        rates: Learning rate of each member at the end of the window; NaN where unknown.
        losses: Mean loss of each member over the window; NaN where unknown.
        slots: The members' slots, in the order of the rows.
    """

    index: int
    round: int
    norms: NDArray[np.float64]
    rates: NDArray[np.float64]
    losses: NDArray[np.float64]
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Decision:
    """What a policy wants from the next round on.

    Attributes:
        choices: One (codec, level) a tensor.
        critical: Whether each tensor is in its critical regime, as the policy sees it.
        reason: One short sentence for the event log.
        batch_multiplier: How many batches a worker accumulates a step, for the whole layout.
        statistics: What the decision was made from, by name, one number a tensor: it goes to the event log, so that a
            reader can follow the decision. Empty where a policy looked at nothing.
    """

    choices: tuple[Choice, ...]
    critical: tuple[bool, ...]
    reason: str
    batch_multiplier: int = 1
    statistics: Mapping[str, tuple[float, ...]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Plan:
    """A decision as it travels: numbered, and valid for a time.

    It comes to the workers inside the result of a round r, and holds from round r + 1.

    Attributes:
        version: Counts up from 1 and is never used twice; 0 is the plan that every process starts from.
        choices: One (codec, level) a tensor of the layout.
        critical: The regime of each tensor.
        expires_round: Last round it holds for; afterwards all use the safe level.
        batch_multiplier: How many batches a worker accumulates a step (1 unless a policy grows the batch).
        period: Rounds of local work between two synchronisations (1 unless a policy says so).
        reason: Why, for people.
    """

    version: int
    choices: tuple[Choice, ...]
    critical: tuple[bool, ...]
    expires_round: int
    batch_multiplier: int = 1
    period: int = 1
    reason: str = ""


class Policy(ABC):
    """Decides levels for the tensors of one layout. One instance a layout, owned by the coordinator.

    Rows of buffers are no tensors here: they have no gradients, and nobody decides about them.

    Args (of every subclass): `light` and `heavy`, two choices a tensor, of one codec; then its own options.
    """

    def __init__(self, *, light: Sequence[Choice], heavy: Sequence[Choice]) -> None:
        """Keep the two choices between which a policy decides, and so how many tensors there are."""
        self.light = tuple(light)
        self.heavy = tuple(heavy)
        self.tensors = len(self.light)

    def start(self) -> Decision:
        """Return the safe decision: light compression everywhere, every tensor critical."""
        return self.all_light("start")

    def all_light(self, reason: str) -> Decision:
        """Return light compression for every tensor, and steps of one batch."""
        return Decision(self.light, (True,) * self.tensors, reason)

    def state(self) -> dict[str, Any]:
        """Return what the policy has learned, as plain types: for a checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027  # what has learned nothing has nothing to restore
        """Go on from what `state` returned."""

    @abstractmethod
    def window(self, window: Window) -> Decision | None:
        """Take in a finished window; return a new decision, or None to leave things as they are."""

    @abstractmethod
    def rate(self, rate: float, round_: int) -> Decision | None:
        """Take in a learning rate; return a new decision, or None to leave things as they are.

        Called when the rate that the lowest member reports changes, in between windows too.

        Args:
            rate: The learning rate, finite and not negative.
            round_: First round that uses it.
        """
