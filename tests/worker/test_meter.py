"""Counters and metrics lines: what was moved is what is said, and start-up is kept apart."""

import json
from types import SimpleNamespace

import pytest
from machines import layout_of, plan_bytes, settings_of

from ps_accordion.regimes import Choice
from ps_accordion.regimes.plan import decode_plan
from ps_accordion.telemetry.events import JsonLines
from ps_accordion.telemetry.trace import Trace
from ps_accordion.worker.exchange import Timing
from ps_accordion.worker.meter import Meter
from ps_accordion.worker.rounds import Decide

LAYOUT = layout_of(settings_of())


class Run:
    """A meter over counters that the test moves."""

    def __init__(self, file=None) -> None:
        transport = SimpleNamespace(sent_bytes=0, received_bytes=0, lending=SimpleNamespace(lent_bytes=0, borrowed_bytes=0))
        self.client = SimpleNamespace(transport=transport, state_bytes=0, trace=Trace())
        self.rounds = SimpleNamespace(idle=None)
        self.exchange = SimpleNamespace(layout=LAYOUT, number=0, rounds=self.rounds)
        self.meter = Meter(self.client)
        self.round = 0
        self.plan = None
        self.file = file
        if file is not None:
            self.meter.write_to(JsonLines(file))

    def move(self, sent: int, received: int, *, state: int = 0) -> None:
        self.client.transport.sent_bytes += sent + state
        self.client.transport.received_bytes += received
        self.client.state_bytes += state

    def decide(self, kind: str = "DATA") -> None:
        self.meter.decided(self.exchange, Decide(self.round, kind, (1, 1, 1), (), self.plan), Timing())
        self.round += 1

    def lines(self) -> list[dict]:
        self.meter.close()
        return [json.loads(line) for line in self.file.read_text().splitlines()]


def test_start_up_is_kept_apart():
    """Joining and the initial parameters come before the first gradient; the start counts once."""
    run = Run()
    run.move(1000, 500)
    run.meter.start()
    run.move(30, 20)
    run.meter.start()
    run.decide()
    run.move(3, 2)
    run.decide()
    counters = run.meter.counters
    assert (counters.startup_bytes, counters.push_bytes, counters.pull_bytes) == (1500, 33, 22)
    assert counters.dense_bytes == 2 * 4 * LAYOUT.elements


def test_state_that_others_fetch_late_is_start_up_too():
    """The lowest slot begins while others still fetch its parameters: those bytes are not its gradients'."""
    run = Run()
    run.move(10, 10)
    run.meter.start()
    run.move(30, 20, state=1_000_000)
    run.decide()
    run.move(30, 20, state=1_000_000)
    run.decide()
    assert (run.meter.counters.push_bytes, run.meter.counters.pull_bytes) == (60, 40)


def test_lines_add_up_to_the_counters(tmp_path):
    """Bytes, rounds and skips; a line for every round but a JOIN and the END."""
    run = Run(tmp_path / "m.jsonl")
    run.meter.start()
    for kind, sent in (("DATA", 100), ("SKIP", 101), ("JOIN", 0), ("DATA", 102), ("END", 0)):
        run.move(sent, 50 if sent else 0)
        run.decide(kind)
    lines, counters = run.lines(), run.meter.counters
    assert [(line["round"], line["kind"]) for line in lines] == [(0, "DATA"), (1, "SKIP"), (3, "DATA")]
    assert [line["push_bytes"] for line in lines] == [100, 101, 102]
    for name in ("push_bytes", "pull_bytes", "dense_bytes"):
        assert sum(line[name] for line in lines) == getattr(counters, name)
    assert (counters.rounds, counters.skipped_rounds) == (3, 1)


@pytest.mark.parametrize("idle", ["JOINED", "EMPTY"])
def test_rounds_of_others_are_not_counted(tmp_path, idle):
    """A worker that waits for the others makes no steps; what passed meanwhile stands in its next line."""
    run = Run(tmp_path / "m.jsonl")
    run.meter.start()
    run.decide()
    run.rounds.idle = idle
    for _ in range(3):
        run.move(7, 5)
        run.decide()
    run.rounds.idle = None
    run.move(100, 50)
    run.decide()
    assert [(line["round"], line["push_bytes"]) for line in run.lines()] == [(0, 0), (4, 121)]
    assert (run.meter.counters.rounds, run.meter.counters.pull_bytes) == (2, 65)


def test_what_the_script_says_goes_with_the_round_before(tmp_path):
    """Loss and accuracy of a step are known after its round: they stand in that round's line, the last word of each name."""
    run = Run(tmp_path / "m.jsonl")
    run.meter.log({"loss": 99.0})  # before any round there is no line to go with
    run.meter.start()
    for number in range(3):
        run.decide()
        run.meter.log({"loss": -1.0})
        run.meter.log({"loss": float(number), "accuracy": 0.5})
    assert [(line["round"], line["loss"], line["accuracy"]) for line in run.lines()] == [(n, float(n), 0.5) for n in range(3)]


def test_the_regime_is_the_share_of_critical_tensors(tmp_path):
    """Everything is critical before a plan; small tensors do not count."""
    run = Run(tmp_path / "m.jsonl")
    run.decide()
    run.plan = decode_plan(plan_bytes(3, Choice("topk", 0.1)), 3)
    run.decide()
    assert [(line["critical_share"], line["plan"]) for line in run.lines()] == [(1.0, 0), (0.0, 3)]


def test_times_are_never_negative(tmp_path):
    """Whatever order the parts of a round end in."""
    run = Run(tmp_path / "m.jsonl")
    run.meter.start()
    for _ in range(3):
        run.decide()
    for line in run.lines():
        assert all(value >= 0 for name, value in line.items() if name.endswith("_s"))


@pytest.mark.parametrize("closes", [1, 2])
def test_a_meter_without_a_file_counts_all_the_same(closes):
    """Nothing is written, nothing fails, and closing twice is harmless."""
    run = Run()
    run.decide()
    run.meter.log({"loss": 1.0})
    for _ in range(closes):
        run.meter.close()
    assert run.meter.counters.rounds == 1
