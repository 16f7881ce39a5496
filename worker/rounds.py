"""The rounds of one layout, as a worker sees them: a state machine.

    round r: pushes go out as gradients come ──> results come in ──> all keys in hand, under one view ──> decided ──> round r + 1

A round is decided only with every key's result in hand: applied, or skipped if any key was skipped anywhere. A push is kept and
asked after until its result is there. A worker without gradients is idle: it pushes JOINED where it waits for the others to come
to the end of their data, and EMPTY where it has finished, round after round, until all do: that round is the JOIN, or the END.
One that leaves while the others go on hands over its residual with FLUSH, once, and is EMPTY until a view is without it.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from typing_extensions import Buffer

from ps_accordion.codecs import registry
from ps_accordion.codecs.base import Codec, Coding, Payload
from ps_accordion.config import Settings
from ps_accordion.errors import CodecError, TooManySkips, UsageError, WireError
from ps_accordion.layout import Key, Layout
from ps_accordion.regimes.base import Choice, Plan
from ps_accordion.regimes.plan import decode_plan, encode_plan
from ps_accordion.selection import Selection, codecs_of
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Send
from ps_accordion.wire.framing import join_frames
from ps_accordion.wire.lane import Loan

from .coder import coding_of
from .following import Start
from .pushes import Pushes
from .retained import Retained

__all__ = ["Decide", "Decode", "Rounds", "Standing"]

SKIPS_KEPT = 64
"""Skipped rounds that are remembered, for workers that come back: who was out for longer has no open push any more."""


@dataclass(frozen=True, slots=True)
class Decode:
    """Decode the result of one key, then say so with `Rounds.decoded`."""

    key: int
    result: m.Result
    payload: Payload
    codec: Codec
    loan: Loan | None = None

    @property
    def coding(self) -> Coding:
        """What the header says of the payload."""
        return coding_of(self.result)

    def verified(self) -> bool:
        """Whether the payload is that of the result, which `stands` tells again afterwards.

        Raises:
            WireError: It is in the server's memory, and not what was lent.
        """
        return self.loan is None or self.loan.verified()

    @property
    def stands(self) -> bool:
        """Whether the payload still is that of the result: if not, what was decoded is anything."""
        return self.loan is None or self.loan.stands


@dataclass(frozen=True, slots=True)
class Decide:
    """The round is decided.

    Attributes:
        round: Its number.
        kind: DATA (apply it), SKIP, JOIN or END.
        used: Used bits of each key: what any worker had a gradient for.
        take_back: Pushes whose payload returns to the residual, because the round was skipped.
        plan: The plan that held in this round; None where none did.
        out: Whether this worker was taken out of the run before it knew what became of the round: to it alone it is a SKIP.
    """

    round: int
    kind: str
    used: tuple[int, ...]
    take_back: tuple[tuple[m.Push, Payload], ...]
    plan: Plan | None = None
    out: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a layout's rounds stand, beside the model: what whoever joins in the middle must know.

    Attributes:
        round: The open round.
        previous_skipped: Whether the round before was skipped.
        skipped_in_a_row: How many were, up to that one.
        lead: Lowest slot that trained in the round before.
        skipped: Numbers of rounds that were skipped lately.
        plan: The plan in force, as bytes; empty where there is none.
        starts: Results that codecs go on from.
    """

    round: int = 0
    previous_skipped: bool = False
    skipped_in_a_row: int = 0
    lead: int | None = None
    skipped: tuple[int, ...] = ()
    plan: bytes = b""
    starts: tuple[Start, ...] = ()


class Rounds:
    """One layout's rounds at one worker.

    Args:
        number: Number of the layout.
        layout: The layout.
        settings: The settings of the job.
    """

    def __init__(self, number: int, layout: Layout, settings: Settings) -> None:
        self.number = number
        self.layout = layout
        self.settings = settings
        self.codecs = codecs_of(settings.codec)
        """All codecs that a result may have, with the job's options."""
        self._fitted = registry.Fitted(self.codecs)
        self._selection = Selection(settings.codec, layout)
        self.round = 0
        self.plan: Plan | None = None
        self.previous_skipped = False
        self.skipped_in_a_row = 0
        self.idle: Literal["JOINED", "FLUSH", "EMPTY"] | None = None
        """What this worker pushes in every round from now on, because it has no gradients; None while it trains."""
        self.leaving = False
        """Whether that is so because it leaves the run while the others go on."""
        self.ended = False
        self.alone = False
        """Whether they have ended for this worker alone: it was taken out when it had finished, and the others go on."""
        self.out = False
        """Whether this worker has been taken out of the run, and has not been let in again."""
        self.skipped: collections.deque[int] = collections.deque(maxlen=SKIPS_KEPT)
        self._left: list[tuple[m.Push, Payload | None]] = []
        self._who: tuple[int, int] | None = None
        self.uncounted = False
        """Whether the round before it came in again was made again without it, and what it had pushed in it is not kept."""
        self._lead: int | None = None
        self.view: m.View | None = None
        self.pushes = Pushes(number, layout, settings)
        self._near_under: tuple[m.View | None, set[int]] = None, set()
        self._results: dict[int, m.Result] = {}
        self._decoded: set[int] = set()
        self._next_plan: Plan | None = None
        self.promised = -1
        """Number of the view before which no round is decided, because a shard has lost its memory."""
        self.retained = Retained(number, layout, rounds=settings.servers.replay_rounds)

    @property
    def held(self) -> bool:
        """Whether it has promised to decide nothing, and to take over no state, until there is another view."""
        return self.view is not None and self.promised > self.view.p

    @property
    def plan_version(self) -> int:
        """Version of the plan in force; 0 before the first."""
        return self.plan.version if self.plan is not None else 0

    @property
    def lead(self) -> int:
        """The lowest slot that trained in the last round; -1 before this worker knows any."""
        if self._lead is None:
            return self.view.donor if self.view is not None else -1
        return self._lead

    @property
    def batch_multiplier(self) -> int:
        """Batches that a worker takes for the current round, as the plan in force says."""
        plan = self._plan_in_force()
        return plan.batch_multiplier if plan is not None else 1

    def choice(self, key: Key) -> Choice:
        """Return codec and level of a key in the current round: the plan's, or the safe one where no plan holds."""
        fixed = self._selection.fixed(key)
        if fixed is not None:
            return fixed
        plan = self._plan_in_force()
        choice = (plan.choices if plan is not None else self._selection.light)[key.tensor]
        return Choice(*registry.effective(choice.codec, choice.level, key.elements, codecs=self._fitted.of(key.rows)))

    def _plan_in_force(self) -> Plan | None:
        return self.plan if self.plan is not None and self.round <= self.plan.expires_round else None

    # ------------------------------------------------------------ out

    def pushed(self, push: m.Push, payload: Payload | None, now: float) -> list[Send]:
        """Send a push, now or when `released` says so, and keep it until its result is there."""
        near = self.layout.keys[push.key].shard in self._near
        return self.pushes.add(push, payload, now, out=self.out, near=near)

    def released(self, now: float) -> list[Send]:
        """Send what was held back and need not be any more; see `Pushes.released`."""
        return [] if self.out else self.pushes.released(now)

    @property
    def _near(self) -> set[int]:
        """The shards on this host: they share no link."""
        if self._near_under[0] is not self.view:
            shards = () if self.view is None else self.view.shards
            self._near_under = self.view, {number for number, _, address in shards if address.startswith("ipc://")}
        return self._near_under[1]

    @property
    def waits(self) -> bool:
        """Whether everything of the open round has been pushed, and its results are awaited."""
        return self.pushes.whole and not self.ended

    @property
    def open_pushes(self) -> dict[int, tuple[m.Push, Payload | None]]:
        """What has been pushed of the open round, by key; empty until that is all of it."""
        return {key: (sent.push, sent.payload) for key, sent in self.pushes.sent.items()} if self.pushes.whole else {}

    def owing(self) -> set[str]:
        """Return the names of the servers that have not answered every push of the open round."""
        return self.pushes.owing(self._results)

    def tick(self, now: float) -> list[Send]:
        """Ask after pushes that have had no result for too long; see `Pushes.ask`."""
        return [] if self.out else self.pushes.ask(self.round, self._results, now)

    def on_missing(self, missing: m.Missing, now: float) -> list[Send]:
        """Send again what a shard says it lacks; see `Pushes.on_missing`."""
        if missing.round != self.round or self.out:
            return []
        return self.pushes.on_missing(missing, self._results, now)

    def ask_again(self, link: str, now: float) -> None:
        """Ask a server at once after all that it has not answered: its connection is new, and pushes may be lost."""
        self.pushes.ask_at_once(self._results, now, link=link)

    # ------------------------------------------------------------ in

    def on_result(self, result: m.Result, frames: Sequence[Buffer], now: float, loan: Loan | None = None) -> Decode | None:
        """Take in a result of the current round; return what is to be decoded, if anything.

        Args:
            result: The result.
            frames: What came behind it.
            now: The time.
            loan: Where the frames lie in the lane of the server.

        The payload is yet to be verified, and validated.

        Raises:
            WireError: The result does not fit the layout.
        """
        if (
            self.ended
            or self.out
            or result.round != self.round
            or result.key not in self.pushes.sent
            or result.key in self._results
        ):
            return None
        if not self._may_count(result):
            return None
        key = self.layout.keys[result.key]
        plan_frames = frames[len(result.frames) :]
        if result.plan:
            if len(plan_frames) != 1 or memoryview(plan_frames[0]).nbytes != result.plan:
                raise WireError(f"result of key {result.key}: expected a plan of {result.plan} bytes behind the payload")
            self._next_plan = decode_plan(bytes(plan_frames[0]), len(self.layout.tensors))
        self._results[result.key] = result
        self.pushes.answered(result.key, now)
        self.retained.note(result, frames, loan)
        if result.kind != "DATA":
            self._decoded.add(result.key)
            return None
        if result.elements != key.elements or result.used & ~key.all_used:
            raise WireError(f"result of key {result.key}: expected {key.elements} elements, got {result.elements}")
        try:
            codec = registry.find(self._fitted.of(key.rows), result.codec)
            codec.check_level(result.level)
        except CodecError as error:
            raise WireError(f"result of key {result.key}: {error}") from None
        payload = join_frames(frames[: len(result.frames)], result.frames, fixed=not codec.takes_any(result.level))
        return Decode(result.key, result, payload, codec, loan)

    def _may_count(self, result: m.Result) -> bool:
        if self.view is None:
            return False
        cut, previous_epoch = self.view.cut_of(self.number)
        return result.epoch == (self.view.p if self.round >= cut else previous_epoch)

    def decoded(self, decode: Decode, *, stands: bool = True) -> None:
        """Note that a key's result has been decoded, unless a view has taken that result back meanwhile.

        Nor where its memory was overwritten: a server does that only when the members are past the round, so this worker is none.
        """
        if self._results.get(decode.key) is not decode.result:
            return
        if stands:
            self._decoded.add(decode.key)
        else:
            del self._results[decode.key]

    # ------------------------------------------------------------ views

    def on_view(self, view: m.View, now: float, *, member: bool) -> None:
        """Obey a view: results that do not count under it are dropped, and what has no result is asked after at once.

        Args:
            view: The view, newer than the last one.
            now: The time.
            member: Whether it names this worker.
        """
        self.retained.seen(self.view)
        self.view = view
        if not member:
            self.out = True
            return
        for key in [key for key, result in self._results.items() if not self._may_count(result)]:
            del self._results[key]
            self._decoded.discard(key)
            if key == 0:
                self._next_plan = None
        self.pushes.ask_at_once(self._results, now)

    @property
    def standing(self) -> Standing:
        """Where this worker stands, for one that joins."""
        plan = b"" if self.plan is None else encode_plan(self.plan)
        return Standing(self.round, self.previous_skipped, self.skipped_in_a_row, self.lead, tuple(self.skipped), plan)

    def admit(self, standing: Standing, incarnation: int) -> tuple[tuple[m.Push, Payload], ...]:
        """Go on where the others stand, in a view that names this worker.

        Args:
            standing: What the donor said.
            incarnation: Of this worker now.

        Returns:
            Payloads that return to the residual: what this worker pushed when it was taken out, and nobody counted.
        """
        assert self.view is not None
        cuts = {(slot, then): cut for slot, then, layout, cut in self.view.removed if layout == self.number}
        if self._who in cuts and cuts[self._who] < self.round and not self.previous_skipped:
            again = self.retained.since(cuts[self._who], self._who)
            self._left += again
            self.uncounted = not again
        self._who = None
        self.round, self.previous_skipped = standing.round, standing.previous_skipped
        self.skipped_in_a_row, self._lead = standing.skipped_in_a_row, standing.lead
        self.skipped = collections.deque(standing.skipped, maxlen=SKIPS_KEPT)
        self.plan = decode_plan(standing.plan, len(self.layout.tensors)) if standing.plan else None
        back = tuple(
            (push, payload)
            for push, payload in self._left
            if payload is not None
            and (push.round >= cuts.get((push.slot, push.incarnation), 0) or push.round in self.skipped)
            and not self.layout.keys[push.key].buffer
        )
        self._left, self._next_plan, self.out = [], None, False
        self.retained.forget()
        self._begin()
        return back

    def decide(self) -> Decide | None:
        """Decide the round if every key's result is in hand, and go on to the next.

        Raises:
            TooManySkips: More rounds in a row were skipped than `skip.limit` allows.
            UsageError: Others wait for the state that only this worker has, and it has left its session, or is about to.
        """
        if self.out:
            return self._step_out()
        if self.ended or self.held or len(self._decoded) < len(self.layout.keys):
            return None
        kinds = {result.kind for result in self._results.values()}
        used = tuple(self._results[key.number].used for key in self.layout.keys)
        if "END" in kinds:
            self.ended = True
            return Decide(self.round, "END", used, ())
        self._lead = self._results[0].lead
        skip = "SKIP" in kinds
        keys = self.layout.keys
        take_back = tuple(
            (sent.push, sent.payload)
            for sent in self.pushes.sent.values()
            if skip and sent.payload is not None and not keys[sent.push.key].buffer
        )
        kind = "SKIP" if skip else "JOIN" if "JOIN" in kinds else "DATA"
        mine = self.pushes.sent[0].push
        if kind == "JOIN" and mine.kind == "EMPTY" and mine.slot == self._lead:
            waiting = "and others wait in join() for the steps that it made without them"
            if self.leaving:
                raise UsageError(
                    f"worker {mine.slot} is leaving, by leave() or SIGTERM, {waiting}: nobody else has the state after those, "
                    "and it does not stay to hand it out. Let the last one with data come to the end of its join() block first"
                )
            raise UsageError(
                f"worker {mine.slot} has left its session, {waiting}; "
                "put the training loop of every worker into `with session.join():`"
            )
        decision = Decide(self.round, kind, used, take_back, self._plan_in_force())
        if self._next_plan is not None:
            self.plan, self._next_plan = self._next_plan, None
        if skip:
            self.skipped.append(self.round)
        self.previous_skipped = skip
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skip else 0
        if self.skipped_in_a_row >= self.settings.skip.limit:
            raise TooManySkips(
                f"rounds {self.round - self.skipped_in_a_row + 1} to {self.round} were all skipped, because some gradient was "
                f"not finite in each (skip.limit = {self.settings.skip.limit}); look for the worker that logged NaN or "
                "infinity first, lower the learning rate, or raise the limit"
            )
        self._who = (mine.slot, mine.incarnation)
        self.retained.seen(self.view)
        self.retained.decided(self.round, self.open_pushes)
        self.round += 1
        self._begin()
        return decision

    def _begin(self) -> None:
        """Open a round of which nothing is pushed."""
        self._results, self._decoded = {}, set()
        self.pushes.end()

    def _step_out(self) -> Decide | None:
        """End the open round of a worker that is out, once backward has handed over all of it."""
        if not self.waits:
            return None
        self._left += [(sent.push, sent.payload) for sent in self.pushes.sent.values()]
        self._begin()
        self._next_plan = None
        return Decide(self.round, "SKIP", (0,) * len(self.layout.keys), (), self._plan_in_force(), out=True)
