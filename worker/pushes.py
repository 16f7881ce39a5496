"""What a worker has pushed of a layout's open round: kept until that is decided, and asked after until it is answered. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ps_accordion.codecs.base import Payload
from ps_accordion.config import Settings
from ps_accordion.layout import Layout
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Send
from ps_accordion.wire.framing import split_frames

from .credit import Credit

__all__ = ["Pushes", "Sent", "server_name"]

ASK_BACKOFF, ASK_MOST = 2.0, 10.0
"""A worker that waits for a slow one asks less and less often: after 1, 2, 4, 8, 10, 10 ... times `timeouts.resend`."""


def server_name(shard: int, settings: Settings) -> str:
    """Return the name of the link to the server that holds `shard`."""
    return f"server {shard // settings.servers.shards_per_server}"


@dataclass
class Sent:
    """A push of the open round.

    Attributes:
        push: The message.
        payload: uint8[nbytes], which is not copied and stays as it is; None where there is none.
        due: When its server is to be asked after it.
        wait: Seconds from one such question to the next.
        held_back: Whether it has yet to be sent, because so much else is under way to its server.
    """

    push: m.Push
    payload: Payload | None
    due: float
    wait: float
    held_back: bool = False

    def ask_at(self, due: float, wait: float) -> None:
        """Ask after it then, and after `wait` seconds more."""
        self.due, self.wait = due, wait


class Pushes:
    """The pushes of one layout's open round. What has been answered, and so is not asked after, the caller says.

    Args:
        number: Number of the layout.
        layout: The layout.
        settings: The settings of the job.

    Attributes:
        sent: By key, in the order in which they came.
    """

    def __init__(self, number: int, layout: Layout, settings: Settings) -> None:
        self._number = number
        self._layout = layout
        self._settings = settings
        self.sent: dict[int, Sent] = {}
        self._heard: dict[str, float] = {}
        """When each server last had a result for this worker, by its link."""
        self._credit = Credit(settings.servers.credit)

    @property
    def whole(self) -> bool:
        """Whether every key of the round has been pushed."""
        return len(self.sent) == len(self._layout.keys)

    def owing(self, answered: Collection[int]) -> set[str]:
        """Return the names of the servers that have not answered every push."""
        return {self._server_of(key) for key in self.sent if key not in answered}

    def add(self, push: m.Push, payload: Payload | None, now: float, *, out: bool, near: bool) -> list[Send]:
        """Send a push, now or when `released` says so.

        Args:
            push: The push.
            payload: uint8[nbytes], left alone by the caller from now on.
            now: The time.
            out: Whether this worker is out of the run: then the push is only kept.
            near: Whether its server is on this host, and shares no link.
        """
        wait = self._settings.timeouts.resend
        sent = self.sent[push.key] = Sent(push, payload, now + wait, wait)
        if out:
            return []
        nbytes = 0 if payload is None or near else payload.nbytes
        sent.held_back = not self._credit.may_go(self._server_of(push.key), push.key, nbytes)
        return [] if sent.held_back else [self._send(sent)]

    def released(self, now: float) -> list[Send]:
        """Send what was held back and need not be any more: after each result, and what else says that a push has arrived."""
        sends = []
        for key in self._credit.released():
            sent = self.sent[key]
            sent.held_back, sent.due = False, now + sent.wait
            sends.append(self._send(sent))
        return sends

    def answered(self, key: int, now: float) -> None:
        """Note that a result is there."""
        server = self._server_of(key)
        self._heard[server] = now
        self._credit.arrived(server, key)

    def ask(self, round_: int, answered: Collection[int], now: float) -> list[Send]:
        """Ask after pushes that have had no result for too long, and whose server has had none of any key for as long.

        While results come, what is missing may well lie in the queue behind them: asked for, it would be sent twice.
        """
        late: dict[int, list[int]] = {}
        resend = self._settings.timeouts.resend
        longest = ASK_MOST * resend
        example: m.Push | None = None
        for number, sent in self.sent.items():
            if number not in answered and now >= sent.due and not sent.held_back:
                quiet = self._heard.get(self._server_of(number), now - resend) + resend
                if now < quiet:
                    sent.due = quiet
                    continue
                wait = min(sent.wait * ASK_BACKOFF, longest)
                sent.ask_at(now + wait, wait)
                example = sent.push
                late.setdefault(self._layout.keys[number].shard, []).append(number)
        if example is None:
            return []
        asks = []
        for shard, keys in late.items():
            for start in range(0, len(keys), m.MAX_ASKED):
                part = keys[start : start + m.MAX_ASKED]
                ask = m.Ask(self._number, round_, example.slot, example.incarnation, part)
                asks.append(Send((server_name(shard, self._settings),), ask))
        return asks

    def on_missing(self, missing: m.Missing, answered: Collection[int], now: float) -> list[Send]:
        """Send again what a shard says it lacks, and what was held back in favour of what it says it holds."""
        again = [self.sent[key] for key in missing.keys if key in self.sent and key not in answered]
        again = [sent for sent in again if not sent.held_back]
        for sent in again:
            wait = self._settings.timeouts.resend  # the shard has answered: it is not slow, it has never seen them
            sent.ask_at(now + wait, wait)
        held = [(self._server_of(key), key) for key in missing.held if key in self.sent]
        for server in {server for server, key in held if self._credit.arrived(server, key)}:
            self._credit.ease(server)
        return [self._send(sent) for sent in again] + self.released(now)

    def ask_at_once(self, answered: Collection[int], now: float, *, link: str | None = None) -> None:
        """Have `ask` ask at once after all that has no result: of one server, whose connection is new, or of every one."""
        for key, sent in self.sent.items():
            if key not in answered and link in (None, self._server_of(key)):
                sent.ask_at(now, self._settings.timeouts.resend)
        if link is None:
            self._heard.clear()
        else:
            self._heard.pop(link, None)

    def end(self) -> None:
        """Forget the round."""
        self.sent = {}
        self._credit.end()

    def _server_of(self, key: int) -> str:
        return server_name(self._layout.keys[key].shard, self._settings)

    def _send(self, sent: Sent) -> Send:
        return Send((self._server_of(sent.push.key),), sent.push, () if sent.payload is None else split_frames(sent.payload.data))
