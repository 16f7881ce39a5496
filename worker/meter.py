"""Counters of one worker, and a line of metrics a round."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from ps_accordion.telemetry.events import JsonLines

from .client import Client
from .exchange import Exchange, Timing
from .rounds import Decide

__all__ = ["Counters", "Meter"]


@dataclass
class Counters:
    """What this worker has moved and done so far.

    Attributes:
        startup_bytes: Bytes both ways before the first gradient: joining and the initial parameters.
        push_bytes: Bytes sent since then, with all headers, signs of life and repetitions; through sockets, or lent.
        pull_bytes: Bytes received since then.
        lane_push_bytes: Those of the sent ones that went through no socket: servers of this host read them from this process.
        lane_pull_bytes: Those of the received ones that this process has read from servers of this host.
        dense_bytes: What dense float32 gradients would have taken so far, in one direction.
        rounds: Rounds decided.
        skipped_rounds: Those of them that were skipped.
    """

    startup_bytes: int = 0
    push_bytes: int = 0
    pull_bytes: int = 0
    lane_push_bytes: int = 0
    lane_pull_bytes: int = 0
    dense_bytes: int = 0
    rounds: int = 0
    skipped_rounds: int = 0


class Meter:
    """Turns decided rounds into counters and metrics lines.

    A line is written when the next round is decided, so that what the script says of a step in between goes with it.
    """

    def __init__(self, client: Client) -> None:
        self.counters = Counters()
        self._client = client
        self._lines = JsonLines(None)
        self._pending: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._sent = self._received = self._startup = 0
        self._started = False
        self._last = time.perf_counter()

    def write_to(self, lines: JsonLines) -> None:
        """Write metrics lines there from now on."""
        self._lines = lines

    def start(self) -> None:
        """Note that the first gradient is there: bytes before it are start-up."""
        if not self._started:
            self._started = True
            self._sent, self._received = self._traffic()
            self._startup = self._sent + self._received
            self.counters.startup_bytes = self._startup + self._client.state_bytes
            self._last = time.perf_counter()

    def decided(self, exchange: Exchange, decision: Decide, timing: Timing) -> None:
        """Count a round."""
        if exchange.rounds.idle is not None or decision.kind in ("JOIN", "END"):
            return  # others may still train; nothing was made here
        now, counters = time.perf_counter(), self.counters
        traffic = self._traffic()
        sent, received = traffic[0] - self._sent, traffic[1] - self._received
        layout, plan, lending = exchange.layout, decision.plan, self._client.transport.lending
        ruled = layout.compressible
        critical = sum(plan.critical[index] for index in ruled) if plan is not None else len(ruled)
        line = {
            "layout": exchange.number,
            "round": decision.round,
            "kind": decision.kind,
            "step_s": now - self._last,
            "compute_s": max(0.0, timing.last_gradient - self._last),
            "encode_s": timing.encode,
            "wait_s": now - timing.last_gradient,
            "decode_s": timing.decode,
            "push_bytes": sent - counters.push_bytes,
            "pull_bytes": received - counters.pull_bytes,
            "lane_push_bytes": lending.lent_bytes - counters.lane_push_bytes,
            "lane_pull_bytes": lending.borrowed_bytes - counters.lane_pull_bytes,
            "dense_bytes": 4 * layout.elements,
            "critical_share": critical / len(ruled) if ruled else 0.0,
            "plan": plan.version if plan is not None else 0,
        }
        self._draw(decision.round, timing.last_gradient, now)
        self._last = now
        counters.push_bytes, counters.pull_bytes = sent, received
        counters.lane_push_bytes, counters.lane_pull_bytes = lending.lent_bytes, lending.borrowed_bytes
        counters.startup_bytes = self._startup + self._client.state_bytes
        counters.dense_bytes += 4 * layout.elements
        counters.rounds += 1
        counters.skipped_rounds += decision.kind == "SKIP"
        self._flush(line)

    def _draw(self, round_: int, last_gradient: float, now: float) -> None:
        """Lay the parts of a round on a thread of their own: until the last gradient, and until all had their results."""
        trace = self._client.trace
        if trace.on:
            parts = (("compute", self._last, last_gradient), ("wait", last_gradient, now))
            for name, began, end in parts:
                if end > began:
                    trace.lay(name, 0, int(1e9 * began), int(1e9 * (end - began)), {"round": round_}, thread_name="rounds")

    def _traffic(self) -> tuple[int, int]:
        """Return bytes sent and received, without the initial state that others still fetch from here."""
        transport = self._client.transport
        lending = transport.lending
        sent = transport.sent_bytes + lending.lent_bytes - self._client.state_bytes
        return sent, transport.received_bytes + lending.borrowed_bytes

    def log(self, values: dict[str, float]) -> None:
        """Attach what the script says to the last decided round."""
        with self._lock:
            if self._pending is not None:
                self._pending.update(values)

    def close(self) -> None:
        """Write what is pending, and close the file."""
        self._flush(None)
        self._lines.close()

    def _flush(self, line: dict[str, Any] | None) -> None:
        with self._lock:
            pending, self._pending = self._pending, line
        if pending is not None:
            self._lines.write(**pending)
