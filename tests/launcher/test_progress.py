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
    progress = Progress(file, tmp_path / "events.jsonl", tmp_path / "worker.jsonl")
    assert progress.update({}) is None
    _append(file, json.dumps(ROW | {"accuracy": 0.5}) + "\n" + json.dumps(ROW | {"round": 7, "loss": 0.25}) + "\n")
    assert progress.update({}) == (
        "step 7 · loss 0.2500 · accuracy 50.0 % · 20.0 ms a step · 2.0 KB a step · 40.0x fewer bytes · 25 % of tensors critical"
    )
    assert progress.update({}) is None


def test_rounds_of_other_layouts_are_not_steps(tmp_path):
    """A push_pull of something else does not show as a step of the model."""
    file = tmp_path / "metrics.jsonl"
    _append(file, json.dumps(ROW) + "\n" + json.dumps(ROW | {"layout": 1, "round": 99}) + "\n")
    assert Progress(file, tmp_path / "events.jsonl", tmp_path / "worker.jsonl").update({}).startswith("step 0 ")


def test_the_line_says_for_whom_the_others_wait(tmp_path):
    """As long as it lasts, near the front; many with the same are counted, and their words cannot break the line."""
    metrics, events = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    progress = Progress(metrics, events, tmp_path / "worker.jsonl")

    def says(*busy):
        for slot, what in busy:
            _append(events, json.dumps({"event": "busy", "slot": slot, "what": what}) + "\n")
        return progress.update({})

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


def test_the_line_says_who_is_missing(tmp_path):
    """Near the front, by role, with what the launcher knows before what the coordinator does; at the end who is all there."""
    metrics, events = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    now = [10.0]
    progress = Progress(metrics, events, tmp_path / "worker.jsonl", clock=lambda: now[0])
    fine = dict.fromkeys(["coordinator", "server 0", "server 1", "worker 0", "worker 1", "worker 2"], "")
    assert progress.update(fine) is None
    _append(metrics, json.dumps(ROW) + "\n")
    assert progress.update(fine).endswith("25 % of tensors critical · servers 2/2 · workers 3/3")
    away = fine | {"worker 2": "restarting in 1.6 s, 3 of 3", "coordinator": "restarting in 0.1 s, 1 of 3"}
    line = "step 0 · coordinator restarting in 0.1 s, 1 of 3 · workers 2/3 (2: restarting in 1.6 s, 3 of 3) · 20.0 ms a step"
    assert progress.update(away).startswith(line)
    assert progress.update(away).endswith("critical · servers 2/2")
    _append(events, json.dumps({"event": "silent", "name": "server 1", "since_s": 2.5}) + "\n")
    _append(events, json.dumps({"event": "silent", "name": "worker 2", "since_s": 2.5}) + "\n")
    assert progress.update(fine).startswith("step 0 · servers 1/2 (1: silent for 2 s) · workers 2/3 (2: silent for 2 s) · 20.0")
    now[0] += 4
    assert progress.update(away | {"worker 0": "lost"}).startswith(
        "step 0 · coordinator restarting in 0.1 s, 1 of 3 · servers 1/2 (1: silent for 6 s) · "
        "workers 1/3 (0: lost; 2: restarting in 1.6 s, 3 of 3) · 20.0"
    )
    for name in ("server 1", "worker 2"):
        _append(events, json.dumps({"event": "heard", "name": name}) + "\n")
    assert progress.update(fine).startswith("step 0 · 20.0 ms a step")
    assert progress.update(fine) is None
    _append(tmp_path / "worker.jsonl", json.dumps({"event": "silent", "name": "coordinator", "since_s": 2.1}) + "\n")
    _append(tmp_path / "worker.jsonl", json.dumps({"event": "silent", "name": "server 0", "since_s": 2.1}) + "\n")
    assert progress.update(fine).startswith("step 0 · coordinator silent for 2 s · 20.0 ms a step")
    _append(tmp_path / "worker.jsonl", json.dumps({"event": "heard", "name": "coordinator", "after_s": 3.0}) + "\n")
    many = {f"worker {slot}": "lost" for slot in range(5)}
    assert progress.update(many).startswith("step 0 · workers 0/5 (0: lost; 1: lost; 2: lost; and 2 more) · ")


def test_other_events_are_none_of_its_business(tmp_path):
    """The coordinator writes plans and joins to the same file."""
    _append(tmp_path / "events.jsonl", json.dumps({"event": "join", "slot": 1}) + "\n")
    assert Progress(tmp_path / "metrics.jsonl", tmp_path / "events.jsonl", tmp_path / "worker.jsonl").update({}) is None


def test_bytes_are_shown_in_powers_of_a_thousand():
    """KB is 1000 bytes."""
    assert [human_bytes(n) for n in (0, 999, 1000, 1_500_000, 2e13)] == ["0 B", "999 B", "1.0 KB", "1.5 MB", "20.0 TB"]


def test_the_line_says_that_the_rounds_stand_still_and_who_has_left(tmp_path):
    """Below `workers.minimum`, for how long; until a view has enough. Who has left is named until another comes in its place."""
    now, metrics, events = [50.0], tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    progress = Progress(metrics, events, tmp_path / "worker.jsonl", clock=lambda: now[0])
    states = {"worker 0": "", "worker 1": ""}
    _append(metrics, json.dumps(ROW | {"round": 7}) + "\n")
    _append(events, json.dumps({"event": "leave", "slot": 1, "early": True}) + "\n")
    assert progress.update(states).startswith("step 7 · workers 1/2 (1: left) · ")
    waiting = {"event": "waiting", "missing": "worker 1 (workers.minimum is 2)", "since_s": 0}
    _append(events, json.dumps(waiting) + "\n")
    progress.update(states)
    now[0] += 12
    line = progress.update(states)
    assert line.startswith("step 7 · waiting for worker 1 (workers.minimum is 2), 12 s · workers 1/2 (1: left) · ")
    _append(events, json.dumps({"event": "resumed", "after_s": 13}) + "\n")
    _append(events, json.dumps({"event": "view", "new": [1]}) + "\n")
    assert "waiting" not in progress.update(states)
    assert progress.update(states) is None
