"""A shard and its members, for tests of what it makes of pushes."""

from dataclasses import dataclass, field

import numpy as np
from machines import BOOT, Member, Pushed, layout_of, notes, sends, settings_of, view_of

from ps_accordion.codecs import Coding, get
from ps_accordion.layout import Tensor
from ps_accordion.regimes import Choice
from ps_accordion.server.shard import Shard
from ps_accordion.wire import messages as m

__all__ = ["HALF", "HEAVY", "LIGHT", "OTHER", "SMALL", "Job", "decoded", "refusal", "result_of", "undo"]

SMALL, HALF, OTHER = 0, 1, 2
"""Keys of the small job: two fused tensors, and the two halves of a large one."""
LIGHT, HEAVY = Choice("topk", 0.1), Choice("topk", 0.01)


@dataclass
class Job:
    """A shard that holds every key, and its members."""

    count: int = 2
    options: dict = field(default_factory=dict)
    seen: bool = True
    table: list[Tensor] | None = None

    def __post_init__(self) -> None:
        self.settings = settings_of(workers_count=self.count, **self.options)
        self.layout = layout_of(self.settings, self.table)
        self.members = [Member(slot, self.settings, self.layout) for slot in range(self.count)]
        self.shard = Shard(0, BOOT, self.settings)
        self.shard.on_layout(0, self.layout)
        if self.seen:
            self.shard.on_view(view_of(self.settings))

    def push(self, slot: int, pushed: Pushed) -> list:
        """Hand a push to the shard as its member would."""
        return self.shard.on_push(self.members[slot].peer, *pushed)

    def round(self, key: int, round_: int, kinds: list[str], *, skipped: bool = False, **options) -> list:
        """Push one round of a key, a kind a member; return the actions of the last push."""
        actions = []
        for slot, kind in enumerate(kinds):
            member = self.members[slot]
            pushed = (
                member.data(key, round_, skipped=skipped, **options)
                if kind == "DATA"
                else member.bare(kind, key, round_, skipped=skipped)
            )
            actions = self.push(slot, pushed)
        return actions

    def residual(self, key: int) -> np.ndarray:
        """Return a copy of the residual that the last round of a key left."""
        return self.shard.records[0, key].residual().copy()


def result_of(actions) -> tuple[m.Result, bytes]:
    """Return the one result among the actions, and all its frames in a row."""
    (send,) = sends(actions, m.Result)
    return send.message, b"".join(bytes(frame) for frame in send.payload)


def decoded(actions) -> np.ndarray:
    """Return what a worker makes of the result among the actions."""
    (send,) = sends(actions, m.Result)
    message = send.message
    coding = Coding(message.codec, message.level, message.elements, message.count, message.seed)
    out = np.empty(message.elements, np.float32)
    payload = np.frombuffer(bytes(send.payload[0]), np.uint8)
    get(message.codec).validate(payload, coding)
    get(message.codec).decode(payload, coding, out)
    return out


def undo(job: Job, round_: int, p: int) -> None:
    """Take back a round by a view."""
    job.shard.on_view(view_of(job.settings, p=p, cuts=[(0, round_, p - 1)]))


def refusal(job: Job, slot: int, pushed: Pushed) -> str:
    """Return the reason for which a push is refused; it must reach its sender, name it, and leave no trace."""
    actions = job.push(slot, pushed)
    (send,) = sends(actions)
    assert isinstance(send.message, m.Refuse)
    assert send.peers == (job.members[slot].peer,)
    assert (send.message.layout, send.message.key, send.message.round) == (0, pushed[0].key, pushed[0].round)
    assert notes(actions, "refused") == [{"culprit": f"worker {slot}", "reason": send.message.reason}]
    assert f"key {pushed[0].key}, round {pushed[0].round} from worker {slot} is refused" in send.message.reason
    assert not job.shard.records[0, pushed[0].key].open
    return send.message.reason
