"""JSON lines: every line is one whole object of plain JSON, whatever is written and whoever writes."""

import json
import math
import subprocess
import sys
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from ps_accordion.telemetry.events import JsonLines


def read(file) -> list[dict]:
    def no_constant(name):
        raise ValueError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=no_constant) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_line_has_the_time_the_fields_of_its_file_and_its_own(tmp_path):
    """In that order; a field of the line wins over one of the file."""
    lines = JsonLines(tmp_path / "x.jsonl", role="worker", place=1)
    before = time.time()
    lines.write(event="join", place=2)
    lines.close()
    (line,) = read(tmp_path / "x.jsonl")
    assert list(line) == ["time", "role", "place", "event"]
    assert {name: line[name] for name in ("role", "place", "event")} == {"role": "worker", "place": 2, "event": "join"}
    assert before - 1 <= line["time"] <= time.time() + 1


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    """A killed process keeps what it wrote."""
    lines = JsonLines(tmp_path / "x.jsonl")
    for number in range(3):
        lines.write(number=number)
        assert [line["number"] for line in read(tmp_path / "x.jsonl")] == list(range(number + 1))
    lines.close()


@pytest.mark.parametrize("length", [1, 200_000])
@pytest.mark.parametrize("lines", [0, 1, 3])
def test_what_a_killed_process_left_of_a_line_is_cut_off(tmp_path, lines, length):
    """A process that is started again goes on behind the last whole line; where all lines are whole, nothing is cut."""
    file = tmp_path / "x.jsonl"
    for torn in ("", '{"torn": "' + "x" * length):
        whole = '{"number": 0}\n' * lines
        file.write_text(whole + torn, encoding="utf-8")
        appended = JsonLines(file)
        appended.write(number=1)
        appended.close()
        assert [line["number"] for line in read(file)] == [0] * lines + [1]
        assert file.read_text(encoding="utf-8").startswith(whole)


def test_what_is_not_a_number_becomes_null(tmp_path):
    """JSON has no NaN and no infinity, however deep they lie; numbers of numpy become plain ones."""
    lines = JsonLines(tmp_path / "x.jsonl")
    lines.write(
        plain=math.nan, deep=[1.0, {"a": (math.inf, -math.inf)}], numpy=np.float32("nan"), number=np.float32(0.5),
        count=np.int64(7), flag=np.bool_(True), nothing=None, text="Zürich\n", keys={3: 4},
    )  # fmt: skip
    lines.close()
    (line,) = read(tmp_path / "x.jsonl")
    del line["time"]
    assert line == {
        "plain": None, "deep": [1.0, {"a": [None, None]}], "numpy": None, "number": 0.5,
        "count": 7, "flag": True, "nothing": None, "text": "Zürich\n", "keys": {"3": 4},
    }  # fmt: skip


def test_each_role_has_a_file_of_its_own(tmp_path):
    """Two processes never write to one; folders are made; a second run appends."""
    for _ in range(2):
        for role, number in (("coordinator", None), ("server", 0), ("worker", 1)):
            lines = JsonLines.of_role(str(tmp_path / "deep" / "run"), "events", role, number)
            lines.write(event="start")
            lines.close()
    folder = tmp_path / "deep" / "run"
    names = ["events-coordinator.jsonl", "events-server-0.jsonl", "events-worker-1.jsonl"]
    assert sorted(file.name for file in folder.iterdir()) == names
    assert [line["role"] for name in names for line in read(folder / name)] == [
        name for role in ("coordinator", "server-0", "worker-1") for name in (role, role)
    ]


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    """Nor is anything opened."""
    monkeypatch.chdir(tmp_path)
    for lines in (JsonLines(None), JsonLines.of_role("", "events", "worker", 0)):
        lines.write(event="x")
        lines.close()
        lines.close()
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_and_writing_late_are_harmless(tmp_path):
    """A thread may still have something to say when the file is closed."""
    lines = JsonLines(tmp_path / "x.jsonl")
    lines.write(event="first")
    lines.close()
    lines.close()
    lines.write(event="late")
    assert [line["event"] for line in read(tmp_path / "x.jsonl")] == ["first"]


def test_threads_do_not_cut_each_others_lines(tmp_path):
    """Every line is whole, and none is missing."""
    lines = JsonLines(tmp_path / "x.jsonl")
    threads = [
        threading.Thread(target=lambda who=who: [lines.write(who=who, number=number, text="x" * 500) for number in range(100)])
        for who in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines.close()
    written = read(tmp_path / "x.jsonl")
    assert sorted((line["who"], line["number"]) for line in written) == [
        (who, number) for who in range(4) for number in range(100)
    ]


def test_what_json_cannot_say_is_an_error_and_leaves_no_half_line(tmp_path):
    """The next line is whole."""
    lines = JsonLines(tmp_path / "x.jsonl")
    with pytest.raises(TypeError):
        lines.write(event=b"bytes")
    lines.write(event="good")
    lines.close()
    assert [line["event"] for line in read(tmp_path / "x.jsonl")] == ["good"]


FULL = """
import resource, signal, sys
from pathlib import Path
from ps_accordion.errors import StorageError
from ps_accordion.telemetry.events import JsonLines
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
lines, taken = JsonLines(Path(sys.argv[1]), role="x"), 0
try:
    while True:
        lines.write(number=taken)
        taken += 1
except StorageError as error:
    print(taken, error)
lines.close()
"""


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    """With the code for it; all lines that were taken are there, and the next process goes on behind them."""
    file = tmp_path / "events.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL, file], capture_output=True, text=True, timeout=100)
    taken, _, message = done.stdout.partition(" ")
    assert message.startswith(f"{file}: expected to append a line of the log, got: File too large; make room"), done.stderr
    with closing(JsonLines(file)) as lines:
        lines.write(number=int(taken))
    assert [json.loads(line)["number"] for line in file.read_text().splitlines()] == list(range(int(taken) + 1))


def test_a_clock_that_jumps_back_an_hour_tears_nothing(tmp_path, monkeypatch):
    """The lines stay in the order in which they were written; only what they say of the time goes back."""
    file = tmp_path / "events.jsonl"
    now = iter([7200.0, 3600.0, 3600.5])
    monkeypatch.setattr(time, "time", lambda: next(now))
    with closing(JsonLines(file)) as lines:
        for number in range(3):
            lines.write(number=number)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["number"], row["time"]) for row in rows] == [(0, 7200.0), (1, 3600.0), (2, 3600.5)]
