import json

from ps_accordion.launcher.progress import Progress, Tail, human_bytes

ROW = {
    "layout": 0,
    "round": 0,
    "step_s": 0.02,
    "push_bytes": 1000,
    "pull_bytes": 1000,
    "dense_bytes": 40_000,
    "critical_share": 0.25,
}


def _append(file, text):
    with file.open("a", encoding="utf-8") as stream:
        stream.write(text)


def test_a_half_written_line_is_read_once_it_is_whole(tmp_path):
    """The reader looks at any moment, also in the middle of a write."""
    file = tmp_path / "metrics.jsonl"
    tail = Tail(file)
    assert tail.read() == []
    _append(file, '{"a": 1}\n{"a"')
    assert tail.read() == [{"a": 1}]
    assert tail.read() == []
    _append(file, ": 2}\n")
    assert tail.read() == [{"a": 2}]


def test_the_line_says_step_loss_time_bytes_ratio_and_regime(tmp_path):
    """The ratio is dense both ways over what moved both ways."""
    file = tmp_path / "metrics.jsonl"
    progress = Progress(file, tmp_path / "events.jsonl")
    assert progress.update() is None
    _append(file, json.dumps(ROW | {"accuracy": 0.5}) + "\n" + json.dumps(ROW | {"round": 7, "loss": 0.25}) + "\n")
    assert progress.update() == (
        "step 7 · loss 0.2500 · accuracy 50.0 % · 20.0 ms a step · 2.0 KB a step · 40.0x fewer bytes · 25 % of tensors critical"
    )
    assert progress.update() is None


def test_rounds_of_other_layouts_are_not_steps(tmp_path):
    """A push_pull of something else does not show as a step of the model."""
    file = tmp_path / "metrics.jsonl"
    _append(file, json.dumps(ROW) + "\n" + json.dumps(ROW | {"layout": 1, "round": 99}) + "\n")
    assert Progress(file, tmp_path / "events.jsonl").update().startswith("step 0 ")


def test_the_line_says_for_whom_the_others_wait(tmp_path):
    """As long as it lasts, near the front; many with the same are counted, and their words cannot break the line."""
    metrics, events = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    progress = Progress(metrics, events)

    def says(*busy):
        for slot, what in busy:
            _append(events, json.dumps({"event": "busy", "slot": slot, "what": what}) + "\n")
        return progress.update()

    assert says((1, "loading")) == "worker 1: loading"  # before the first step
    assert says((1, "")) is None
    _append(metrics, json.dumps(ROW) + "\n")
    assert says().startswith("step 0 · 20.0 ms a step")
    assert says((1, "evaluation")).startswith("step 0 · worker 1: evaluation · 20.0 ms")
    assert says().startswith("step 0 · worker 1: evaluation · ")  # still
    assert says((2, "evaluation"), (0, "a\nb\x1b[1m")).startswith("step 0 · worker 0: a b [1m · workers 1, 2: evaluation · 20")
    assert says((3, "evaluation"), (4, "evaluation"), (0, "")).startswith("step 0 · 4 workers: evaluation · 20.0")
    assert says(*((slot, "") for slot in range(5))).startswith("step 0 · 20.0 ms a step")
    assert says() is None


def test_other_events_are_none_of_its_business(tmp_path):
    """The coordinator writes plans and joins to the same file."""
    _append(tmp_path / "events.jsonl", json.dumps({"event": "join", "slot": 1}) + "\n")
    assert Progress(tmp_path / "metrics.jsonl", tmp_path / "events.jsonl").update() is None


def test_bytes_are_shown_in_powers_of_a_thousand():
    """KB is 1000 bytes."""
    assert [human_bytes(n) for n in (0, 999, 1000, 1_500_000, 2e13)] == ["0 B", "999 B", "1.0 KB", "1.5 MB", "20.0 TB"]
