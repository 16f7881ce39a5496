"""What the pushes of a round come to: the sum, what goes out, and what stays. It decides nothing, and says nothing to anybody."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ps_accordion import crashpoints
from ps_accordion.codecs import fold, keep, registry
from ps_accordion.codecs.base import Payload
from ps_accordion.codecs.registry import Codecs
from ps_accordion.codecs.workspace import zeros
from ps_accordion.config import Settings
from ps_accordion.layout import Key
from ps_accordion.ledger import LOOK_EVERY, Probe
from ps_accordion.seeds import SERVER, seed_for
from ps_accordion.selection import codecs_of
from ps_accordion.wire.framing import split_frames

from . import accounts
from .checking import pushed
from .record import NO_CODING, Held, KeyRecord, Outcome

__all__ = ["Folds"]


class Folds:
    """Folds rounds of the keys of one shard. Used by one thread.

    Args:
        settings: The settings of the job.
        take: Returns memory that workers read results from, of so many bytes; None where they do not.

    Attributes:
        probes: What accounts for a key, by layout and number; buffers have none.
    """

    def __init__(self, settings: Settings, take: Callable[[int], Payload | None]) -> None:
        self.probes: dict[tuple[int, int], Probe] = {}
        self._settings = settings
        self._take = take
        self._codecs = registry.Fitted(codecs_of(settings.codec))
        self._scratch = np.zeros(0, np.float32)

    def hold(self, layout: int, keys: Sequence[Key]) -> None:
        """Make ready for the keys of a layout."""
        self.probes.update({(layout, key.number): Probe(layout, key) for key in keys if not key.buffer})
        largest = max((key.elements for key in keys), default=0)
        if largest > self._scratch.size:
            self._scratch = zeros(largest)

    def codecs_of(self, key: Key) -> Codecs:
        """Return the codecs as they know a key."""
        return self._codecs.of(key.rows)

    def outcome(self, layout: int, record: KeyRecord, held: list[Held], *, skipped: bool) -> Outcome:
        """Return what a round comes to. It is written to the half that the last round does not need, and nothing else changes.

        Args:
            layout: Number of the layout.
            record: The key's.
            held: Pushes of all members, in slot order.
            skipped: Whether the round before was skipped.

        Raises:
            CodecError: Pushes do not go together.
        """
        kinds = {each.message.kind for each in held}
        start = record.start(skipped=skipped)
        bound = record.bound_before if skipped else record.bound
        used = 0
        for each in held:
            used |= each.message.used
        tally = record.tally_before if skipped else record.tally
        nothing = Outcome("SKIP", used, NO_CODING, (), start, start, bound, 0.0, tally)
        if "SKIP" in kinds:
            return nothing
        if kinds == {"EMPTY"}:
            return nothing._replace(kind="END")
        if kinds <= {"EMPTY", "JOINED"}:
            return nothing._replace(kind="JOIN")
        if "DATA" not in kinds:
            handed_over = any(each.payload is not None for each in held)
            return (self._keep(layout, record, held, nothing) if handed_over else nothing._replace(kind="UNUSED")) or nothing
        return self._fold(layout, record, held, nothing) or nothing

    def _keep(self, layout: int, record: KeyRecord, held: list[Held], start: Outcome) -> Outcome | None:
        """Keep residuals that were handed over in the residual here, in a round in which nobody used the key."""
        pushes = pushed(held)
        total_weight = sum(each.message.weight for each in held)
        residual, target = record.halves[start.before], record.target(start.before)
        scratch = self._scratch[: record.key.elements]
        if not keep(pushes, residual, target, total_weight=total_weight, scratch=scratch, codecs=self.codecs_of(record.key)):
            return None
        crashpoints.reach("s.half")
        probe, tally = self.probes[layout, record.key.number], start.tally
        tally = accounts.counted(
            probe, tally, pushes, total_weight, None, (residual, target), codecs=self.codecs_of(record.key), unused=(), lost=0.0,
        )  # fmt: skip
        record.norm = probe.norm(target)
        return start._replace(kind="UNUSED", used=0, after=1 - start.before, tally=tally)

    def _room(self, record: KeyRecord, nbytes: int, *, lent: bool) -> Payload:
        """Return memory for the result of the open round."""
        room = self._take(nbytes) if lent else None
        if room is None:
            return np.empty(nbytes, np.uint8)
        record.lent[record.round + 1] = room
        return room

    def _fold(self, layout: int, record: KeyRecord, held: list[Held], start: Outcome) -> Outcome | None:
        """Fold the pushes of a round. None when the sum is not finite: a push is not, or the round is skipped."""
        key, codecs = record.key, self.codecs_of(record.key)
        pushes = pushed(held)
        # Not of a residual that is handed over: that is large for once, and nobody has asked for less compression.
        levels = [(each.message.codec, each.message.level) for each in held if each.message.kind == "DATA"]
        reply = registry.lightest(levels, key.elements, codecs=codecs)
        codec = codecs[reply[0]]
        bound = codec.payload_bound(key.elements, reply[1])
        residual = record.halves[start.before]
        out = self._room(record, bound, lent=codec.takes_any(reply[1]))
        total_weight = sum(each.message.weight for each in held)
        changes = record.changed(start.before)
        folded = fold(
            pushes,
            residual,
            record.target(start.before) if residual is not None or codec.keeps(reply[1]) else None,
            elements=key.elements,
            total_weight=total_weight,
            seed_reply=seed_for(self._settings.seed, layout, key.number, record.round + 1, SERVER),
            scratch=self._scratch[: key.elements],
            out=out,
            codecs=codecs,
            reply=reply,
            held=[(part.offset, part.length) for part in key.elements_of(start.used)],
            rule=self._settings.codec.residual_at_switch if 0 < start.bound < bound else "keep",
            hint=record.hint,
            changes=changes,
        )
        crashpoints.reach("s.half")
        if folded is None:
            return None
        after = 1 - start.before if folded.wrote else start.before
        if folded.changes is not None:
            record.changes = (after, folded.changes)
        payload = out[: folded.nbytes]
        tally = start.tally
        probe = self.probes.get((layout, key.number))
        if probe is not None:
            left = residual if after == start.before else record.halves[after]
            tally = accounts.counted(
                probe, tally, pushes, total_weight, (folded.coding, payload), (residual, left),
                codecs=codecs, unused=key.elements_of(start.used), lost=folded.lost,
            )  # fmt: skip
            if not record.norm or record.round % LOOK_EVERY == 0 or any(each.message.kind == "FLUSH" for each in held):
                record.norm = probe.norm(left)
        return Outcome(
            "DATA", start.used, folded.coding, split_frames(payload.data), start.before, after, bound, folded.lost, tally
        )
