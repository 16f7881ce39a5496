"""A worker's rounds with real shards behind them, for tests."""

import numpy as np
from machines import BOOT, Member, layout_of, sends, settings_of, view_of

from ps_accordion.regimes import Choice
from ps_accordion.server.shard import Shard
from ps_accordion.wire import messages as m
from ps_accordion.worker.rounds import Decide, Decode, Rounds

__all__ = ["HEAVY", "KEYS", "LIGHT", "NOW", "Job", "changed", "received", "take_in"]

KEYS = (0, 1, 2)
NOW = 50.0
LIGHT, HEAVY = Choice("topk", 0.1), Choice("topk", 0.01)


class Job:
    """One worker of two, with real shards and a second member behind the results."""

    def __init__(self, *, table=None, **options) -> None:
        self.settings = settings_of(**options)
        self.layout = layout_of(self.settings, table)
        self.members = [Member(slot, self.settings, self.layout) for slot in (0, 1)]
        self.shards = [Shard(number, BOOT, self.settings) for number in range(self.settings.num_shards)]
        self.rounds = Rounds(0, self.layout, self.settings)
        self.rounds.view = view_of(self.settings)
        for shard in self.shards:
            shard.on_layout(0, self.layout)
            shard.on_view(self.rounds.view)

    def push(self, *, kinds=("DATA",) * 5, theirs=("DATA",) * 5) -> dict:
        """Push every key of the round, a kind a key; return the results, by key: (message, frames)."""
        round_, skipped, results = self.rounds.round, self.rounds.previous_skipped, {}
        for key in self.layout.keys:
            shard = self.shards[key.shard]
            for member, kind in zip(self.members, (kinds[key.number], theirs[key.number]), strict=True):
                if kind == "DATA":
                    choice = self.rounds.choice(key)
                    message, frames = member.data(key.number, round_, skipped=skipped, choice=choice)
                else:
                    message, frames = member.bare(kind, key.number, round_, skipped=skipped)
                if member.slot == 0:
                    payload = np.frombuffer(frames[0], np.uint8) if frames else None
                    (send,) = self.rounds.pushed(message, payload, NOW)
                    message, frames = send.message, send.payload
                actions = shard.on_push(b"", message, [bytes(frame) for frame in frames])
            (send,) = sends(actions, m.Result)
            results[key.number] = send.message, [bytes(frame) for frame in send.payload]
        return results

    def hand_in(self, results: dict, order=None) -> Decide | None:
        """Hand results in, decode each at once, and decide; only the last may decide the round."""
        decision = None
        for key in results if order is None else order:
            assert decision is None
            take_in(self.rounds, *results[key])
            decision = self.rounds.decide()
        return decision

    def play(self, **kinds) -> Decide | None:
        """Play a whole round."""
        return self.hand_in(self.push(**kinds))


def take_in(rounds: Rounds, message: m.Result, frames, now: float = NOW) -> Decode | None:
    """Hand in a result as the session does: what is to be decoded is decoded at once."""
    decode = rounds.on_result(message, frames, now)
    if decode is not None:
        rounds.decoded(decode)
    return decode


def received(decode: Decode) -> np.ndarray:
    """Return what a codec thread makes of a result."""
    out = np.empty(decode.result.elements, np.float32)
    decode.codec.receive(decode.payload, decode.coding, out)
    return out


def changed(result, **fields):
    message, frames = result
    return m.Result(**({name: getattr(message, name) for name in message.__struct_fields__} | fields)), frames
