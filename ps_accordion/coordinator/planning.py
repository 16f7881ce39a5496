"""From window reports to plans: one planner a layout, at the coordinator.

It collects what the members report, asks the policy when a window is complete, and numbers what comes back.
It has no clock and no socket: time is counted in rounds.

* **A window is complete** when every member has reported it, or when a report of a later window arrives: the rows of those
  who did not report are then NaN, and the policy treats their statistics as missing. Only one window is open at a time.
* **Versions** count up from `last_version + 1` and are never used twice, also across restarts of the coordinator, which
  must hand in the last version that it logged.
* **A plan expires** `life` rounds after the round in which it was made:

      life = max(MIN_LIFE_ROUNDS, LIFE_INTERVALS * interval * rounds a window)

  A finished window without a new decision renews the plan, under a new version with the same levels, once less than half
  of its life is left. So a plan never expires while the coordinator lives and windows end, and a coordinator that is gone
  leaves its last plan in force for at most that long. After that, before any plan, and at version 0, all use light levels.
* **Buffers have no gradients**: policies do not see their rows of the tensor table, which are critical in every plan, with the
  light choice of some tensor.
* **A plan is repeated** until every member reports its version (`pending`).
* **Members** come with each call, because the coordinator's view owns them. The lowest slot's learning rate counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..config import Settings
from ..errors import WireError
from ..layout import Layout
from ..regimes.base import Choice, Decision, Plan, Policy, Window
from ..regimes.plan import MAX_REASON, decode_plan, encode_plan
from ..regimes.registry import build_policy
from ..selection import EXACT, Selection

__all__ = ["LIFE_INTERVALS", "MIN_LIFE_ROUNDS", "Planner"]

T = TypeVar("T")
REJOINED = "a member joined"
LIFE_INTERVALS = 4
"""Intervals between checks that a plan outlives its last sign of life: one check may be late, and one report lost."""
MIN_LIFE_ROUNDS = 2000
"""Rounds that any plan holds. Windows may be a step long, and a round a millisecond: a plan must not expire on its way."""


class _Report(NamedTuple):
    """What one member said of one window."""

    round: int
    norms: NDArray[np.float64]
    rate: float
    loss: float


class Planner:
    """Turns reports into plans for one layout.

    Args:
        number: Number of the layout, for the event log.
        layout: The tensors that are planned for.
        policy: Who decides, about all tensors of the layout but buffers.
        interval: Windows between two decisions of the policy; used for the life of a plan only.
        last_version: Highest version that was ever given out for this layout; 0 at the start of a run.
        last_rate: Learning rate when that plan was made, so that a drop is one also where the coordinator has changed.
    """

    def __init__(
        self,
        number: int,
        layout: Layout,
        policy: Policy,
        *,
        interval: int = 1,
        last_version: int = 0,
        last_rate: float | None = None,
    ) -> None:
        self.number = number
        self.layout = layout
        self.plan: Plan | None = None
        self._encoded = b""
        self._policy = policy
        self._decision = policy.start()
        self._ruled = np.array([not tensor.buffer for tensor in layout.tensors])
        self._interval = interval
        self._members: tuple[int, ...] = ()
        self._version = last_version
        self._open: dict[int, _Report] = {}
        self._open_index = -1
        self._closed_index = -1
        self._window_rounds = 1
        self._made_at = 0
        self._rate = last_rate
        if last_rate is not None:
            policy.rate(last_rate, 0)
        self._rate_round = 0
        self._events: list[dict[str, Any]] = []

    @classmethod
    def for_layout(
        cls, number: int, layout: Layout, settings: Settings, *, last_version: int = 0, last_rate: float | None = None
    ) -> Planner:
        """Build a planner with the policy, codec and levels of a job.

        Raises:
            ConfigError: `[regime]` names no policy or no window.
        """
        selection = Selection(settings.codec, layout)
        light, heavy = (
            [choice for choice, tensor in zip(choices, layout.tensors, strict=True) if not tensor.buffer]
            for choices in (selection.light, selection.heavy)
        )
        policy = build_policy(settings.regime, light=light, heavy=heavy)
        return cls(number, layout, policy, interval=settings.regime.interval, last_version=last_version, last_rate=last_rate)

    def report(
        self,
        slot: int,
        *,
        window: int,
        round_: int,
        norms: NDArray[np.float32],
        rate: float,
        loss: float,
        members: Sequence[int],
    ) -> None:
        """Take in what one member measured over one window.

        A repeated report, one of a closed window and one of a slot that is no member are ignored: reports are sent until they are
        acknowledged, so all three are normal.

        Args:
            slot: Who reports.
            window: Number of the window, from 0.
            round_: Last round of the window.
            norms: float32[tensors], copied. Negative entries count as missing.
            rate: Learning rate at the end of the window; NaN where unknown.
            loss: Mean loss over the window; NaN where unknown.
            members: Slots whose reports make the window complete.

        Raises:
            WireError: The report has not one norm a tensor, or negative numbers for window or round.
        """
        tensors = len(self.layout.tensors)
        if norms.shape != (tensors,):
            raise WireError(f"a report of this layout has {tensors} norms, worker {slot} sent {norms.size}")
        if window < 0 or round_ < 0:
            raise WireError(f"window and round of a report are not negative, worker {slot} sent {window} and {round_}")
        self._set_members(members, round_)
        if slot not in self._members or window <= self._closed_index or window < self._open_index:
            return
        if window > self._open_index:
            if self._open:
                self._close()
            self._open_index = window
        if slot in self._open:
            return
        values = norms.astype(np.float64)
        values[values < 0] = math.nan
        self._open[slot] = _Report(round_, values, rate, loss)
        self._close_if_complete()

    def rate(self, slot: int, rate: float, round_: int, *, members: Sequence[int]) -> None:
        """Take in the learning rate that `slot` uses from `round_` on. Only the lowest member's counts; NaN says nothing."""
        self._set_members(members, round_)
        self._take_rate(slot, rate, round_)

    def rejoined(self, members: Sequence[int], round_: int) -> None:
        """Make every tensor light, because a view has let in a worker from `round_` on; its slot may be one that was a member."""
        self._members = tuple(member for member in self._members if member in members)
        # Without members too, where a coordinator before this one has given out a plan: it may be in force, and not be light.
        if self._members or self._version:
            self._set_members(members, round_)
            if self._decision.reason != REJOINED:
                self._adopt(self._policy.all_light(REJOINED), round_)

    def _take_rate(self, slot: int, rate: float, round_: int) -> None:
        if not self._members or slot != self._members[0] or not math.isfinite(rate) or rate < 0:
            return
        if round_ < self._rate_round:
            return  # A window report may arrive after the next rate: an older rate must not undo what a newer one did.
        self._rate_round = round_
        if rate == self._rate:
            return
        self._rate = rate
        decision = self._policy.rate(rate, round_)
        if decision is not None:
            self._adopt(decision, round_)

    def pending(self, versions: Iterable[int]) -> tuple[int, bytes] | None:
        """Return version and bytes of the plan to send again, or None when every member has it.

        Args:
            versions: The version of the plan in force at each member; 0 for one that has none.
        """
        if self.plan is None or all(version >= self.plan.version for version in versions):
            return None
        return self.plan.version, self._encoded

    def state(self) -> dict[str, Any]:
        """Return all that the planner goes on from, as plain types: for a checkpoint."""
        decision = self._decision
        return {
            "version": self._version,
            "plan": self._encoded,
            "choices": [list(choice) for choice in decision.choices],
            "critical": list(decision.critical),
            "reason": decision.reason,
            "batch_multiplier": decision.batch_multiplier,
            "members": list(self._members),
            "open": {
                slot: [report.round, report.norms.tolist(), report.rate, report.loss] for slot, report in self._open.items()
            },
            "windows": [self._open_index, self._closed_index, self._window_rounds, self._made_at],
            "rate": [self._rate, self._rate_round],
            "policy": self._policy.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._version, self._encoded = state["version"], state["plan"]
        self.plan = decode_plan(self._encoded, len(self.layout.tensors)) if self._encoded else None
        self._decision = Decision(
            tuple(Choice(codec, level) for codec, level in state["choices"]),
            tuple(state["critical"]),
            state["reason"],
            state["batch_multiplier"],
        )
        self._members = tuple(state["members"])
        self._open = {
            int(slot): _Report(round_, np.array(norms, np.float64), rate, loss)
            for slot, (round_, norms, rate, loss) in state["open"].items()
        }
        self._open_index, self._closed_index, self._window_rounds, self._made_at = state["windows"]
        self._rate, self._rate_round = state["rate"]
        self._policy.restore(state["policy"])

    @property
    def last_rate(self) -> float | None:
        """The learning rate that was heard last; None before any."""
        return self._rate

    @property
    def critical_share(self) -> float:
        """Share of the compressible tensors, by number, that are in their critical regime; 1 before any plan."""
        ruled = self.layout.compressible
        if self.plan is None or not ruled:
            return 1.0
        return sum(self.plan.critical[index] for index in ruled) / len(ruled)

    def events(self) -> list[dict[str, Any]]:
        """Return the records for the event log since the last call, oldest first, as plain types.

        Each has `layout`, `version`, `reason`, `round`, `expires_round`, `window` (None after a change of rate or members),
        `rate`, `loss`, `critical_share`, `batch_multiplier`, `renewal`, and lists with one entry a compressible tensor:
        `names`, `codecs`, `levels`, `critical`, and the policy's statistics by name (accordion: `norm_old`, `norm_now`, `ratio`).
        A renewal has empty lists.
        """
        events, self._events = self._events, []
        return events

    def _set_members(self, members: Sequence[int], round_: int) -> None:
        before, now = self._members, tuple(sorted(set(members)))
        if now == before:
            return
        self._members = now
        self._open = {slot: report for slot, report in self._open.items() if slot in now}
        if before and set(now) - set(before):
            self._adopt(self._policy.all_light(REJOINED), round_)
        self._close_if_complete()

    def _close_if_complete(self) -> None:
        if self._open and all(slot in self._open for slot in self._members):
            self._close()

    def _close(self) -> None:
        missing = np.full(len(self.layout.tensors), math.nan)
        rows = [self._open.get(slot) for slot in self._members]
        window = Window(
            index=self._open_index,
            round=max(report.round for report in self._open.values()),
            norms=np.stack([missing if row is None else row.norms for row in rows])[:, self._ruled],
            rates=np.array([math.nan if row is None else row.rate for row in rows]),
            losses=np.array([math.nan if row is None else row.loss for row in rows]),
            slots=self._members,
        )
        self._open = {}
        self._closed_index = window.index
        self._window_rounds = max(self._window_rounds, math.ceil((window.round + 1) / (window.index + 1)))
        # The rate first: a drop that only the report shows must be known before the window is judged.
        self._take_rate(self._members[0], float(window.rates[0]), window.round)
        decision = self._policy.window(window)
        if decision is not None:
            self._adopt(decision, window.round, window)
        elif self.plan is not None and self.plan.expires_round - window.round < self._life / 2:
            kept = replace(self._decision, reason="renewed", statistics={})
            self._adopt(kept, window.round, window, renewal=True)

    @property
    def _life(self) -> int:
        return max(MIN_LIFE_ROUNDS, LIFE_INTERVALS * self._interval * self._window_rounds)

    def _adopt(self, decision: Decision, round_: int, window: Window | None = None, *, renewal: bool = False) -> None:
        self._decision = decision
        decision = self._with_buffers(decision)
        self._version += 1
        # Rounds only go forward: a report that comes late must not shorten a plan made by a rate that came early.
        self._made_at = max(self._made_at, round_)
        self.plan = Plan(
            version=self._version,
            choices=decision.choices,
            critical=decision.critical,
            expires_round=self._made_at + self._life,
            batch_multiplier=decision.batch_multiplier,
            reason=decision.reason.encode()[:MAX_REASON].decode(errors="ignore"),
        )
        self._encoded = encode_plan(self.plan)
        losses = window.losses[np.isfinite(window.losses)] if window is not None else np.empty(0)
        shown = () if renewal else self.layout.compressible
        self._events.append(
            {
                "layout": self.number,
                "version": self.plan.version,
                "reason": self.plan.reason,
                "round": round_,
                "expires_round": self.plan.expires_round,
                "window": None if window is None else window.index,
                "rate": self._rate,
                "loss": float(losses.mean()) if losses.size else None,
                "critical_share": self.critical_share,
                "batch_multiplier": self.plan.batch_multiplier,
                "renewal": renewal,
                "names": [self.layout.tensors[index].name for index in shown],
                "codecs": [decision.choices[index].codec for index in shown],
                "levels": [decision.choices[index].level for index in shown],
                "critical": [decision.critical[index] for index in shown],
                **{name: [values[index] for index in shown] for name, values in decision.statistics.items()},
            }
        )

    def _with_buffers(self, decision: Decision) -> Decision:
        """Return a decision with a place for every row of the table."""
        if self._ruled.all():
            return decision
        return replace(
            decision,
            choices=self._spread(decision.choices, self._policy.light[0] if self._policy.light else EXACT),
            critical=self._spread(decision.critical, True),
            statistics={name: self._spread(values, math.nan) for name, values in decision.statistics.items()},
        )

    def _spread(self, values: Iterable[T], instead: T) -> tuple[T, ...]:
        remaining = iter(values)
        return tuple(next(remaining) if ruled else instead for ruled in self._ruled)
