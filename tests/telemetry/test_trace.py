import json
import threading
from pathlib import Path

import pytest

from ps_accordion.errors import StorageError
from ps_accordion.telemetry import trace
from ps_accordion.telemetry.trace import Trace, merge

FIELDS = {"layout": 0, "key": 3, "round": 7}


def written(directory: Path, role: str, number: int, *spans: list, machine: str = "here", shift: int = 0) -> None:
    """Write a process's file as it would be, with a clock of its own."""
    head = {"role": role, "number": number, "pid": 1, "machine": machine, "at": 1000, "wall": 1000 + shift}
    lines = [head, {"thread": 5, "name": "codec"}, *spans]
    (directory / f"trace-{role}-{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def drawn(directory: Path, *others: Path) -> list[dict]:
    """Return what the picture of these directories holds."""
    merge([directory, *others], directory / "trace.json")
    return json.loads((directory / "trace.json").read_text())["traceEvents"]


def test_spans_of_one_machine_share_a_clock_and_pushes_and_results_are_arrows(tmp_path):
    """Also where the wall clock was set between the starts of two processes: it is asked once a machine."""
    written(tmp_path, "server", 0, ["fold", 5, 6000, 1000, FIELDS], shift=50)
    written(tmp_path, "worker", 1, ["encode", 5, 2000, 3000, FIELDS], ["decode", 5, 8000, 500, FIELDS], shift=999_999)
    events = drawn(tmp_path)
    assert {(each["name"], each["ts"], each["dur"]) for each in events if each["ph"] == "X"} == {
        ("encode", 0, 3), ("fold", 4, 1), ("decode", 6, 0.5),
    }  # fmt: skip
    arrows = [(each["name"], each["ph"], each["ts"], each["pid"]) for each in events if each["ph"] in "sf"]
    assert arrows == [("push", "s", 2.999, 1), ("push", "f", 4, 0), ("result", "s", 4.999, 0), ("result", "f", 6, 1)]


def test_machines_are_placed_by_their_wall_clocks(tmp_path):
    """Their own clocks begin anywhere."""
    (tmp_path / "there").mkdir()
    written(tmp_path, "server", 0, ["fold", 5, 2000, 10, FIELDS])
    written(tmp_path / "there", "worker", 0, ["encode", 5, 900_000, 10, FIELDS], machine="there", shift=-899_000)
    spans = {each["name"]: each["ts"] for each in drawn(tmp_path, tmp_path / "there") if each["ph"] == "X"}
    assert spans == {"encode": 0, "fold": 1}


def test_what_is_written_is_what_is_drawn_by_threads_by_name(tmp_path):
    """A span lasts from when it began until it is noted; a thread is named once."""
    one = Trace(str(tmp_path), "worker", 2)
    began = trace.now()
    thread = threading.Thread(target=lambda: [one.span("encode", began, **FIELDS) for _ in range(2)], name="codec-0")
    thread.start()
    thread.join()
    one.lay("wait", 0, began, 5, {"round": 7}, thread_name="rounds")
    one.close()
    one.span("decode", began, **FIELDS)  # too late: nobody reads it any more
    events = drawn(tmp_path)
    names = [each["args"]["name"] for each in events if each["name"] == "thread_name"]
    assert names == ["codec-0", "rounds"]
    assert [each["name"] for each in events if each["ph"] == "X"] == ["encode", "encode", "wait"]
    assert all(each["args"] == FIELDS for each in events if each["name"] == "encode")


def test_a_killed_process_leaves_what_it_had_written(tmp_path):
    """A torn line is left out, and one that was started again goes on in the same file."""
    written(tmp_path, "server", 0, ["fold", 5, 2000, 10, FIELDS])
    with (tmp_path / "trace-server-0.jsonl").open("a") as stream:
        stream.write('["store", 5, 20')
    again = Trace(str(tmp_path), "server", 0)
    again.span("fold", trace.now(), **FIELDS)
    again.close()
    assert [each["name"] for each in drawn(tmp_path) if each["ph"] == "X"] == ["fold", "fold"]


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    """Which is what a run without --trace does, at every span."""
    monkeypatch.chdir(tmp_path)
    off = Trace()
    off.span("encode", trace.now(), **FIELDS)
    off.close()
    assert (off.on, list(tmp_path.iterdir())) == (False, [])


def test_a_disk_that_fills_up_ends_the_trace_and_not_the_run(tmp_path):
    """A picture is worth less than the run."""
    (tmp_path / "trace-worker-0.jsonl").symlink_to("/dev/full")
    full = Trace(str(tmp_path), "worker", 0)
    full.span("encode", trace.now(), **FIELDS)
    assert not full.on
    full.close()


def test_where_there_are_no_spans_it_says_what_to_do(tmp_path):
    """The pattern, the place, and the flag."""
    with pytest.raises(StorageError, match=r"trace-\*\.jsonl in .*found none; run the job with --trace"):
        merge([tmp_path], tmp_path / "trace.json")
