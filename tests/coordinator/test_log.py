"""The coordinator's log: what it took is there for the next one, and what is not whole is never believed."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ps_accordion.coordinator.log import Log
from ps_accordion.errors import ConfigError, StorageError

JOB = "9d1c"
RECORDS: tuple[dict[str, Any], ...] = (
    {"view": 1, "members": [[0, 1], [1, 2]], "donor": None},
    {"plan": {"version": 3, "levels": [0.04, 1e-300], "critical": [True, False]}},
    {"ended": "ünïcödé\n\x00\ud800", "big": 1 << 63, "empty": {}},
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Make a log of one coordinator with three records; return its file."""
    with Log.open(tmp_path, job=JOB) as log:
        for record in RECORDS:
            log.append(record)
    return tmp_path / "coordinator.log"


def reopened(file: Path) -> tuple[tuple[dict[str, Any], ...], int, bytes]:
    with Log.open(file.parent, job=JOB) as log:
        return log.records, log.term, log.torn


def test_what_was_appended_is_there_for_the_next_coordinator(file: Path) -> None:
    """In order, value by value, over several coordinators; terms count them, and no start is among the records."""
    assert reopened(file) == (RECORDS, 2, b"")
    with Log.open(file.parent, job=JOB) as log:
        assert (log.records, log.term) == (RECORDS, 3)
        log.append({"more": 1})
        assert log.records == RECORDS  # what earlier ones recorded, not this one
    assert reopened(file) == ((*RECORDS, {"more": 1}), 4, b"")


def test_a_new_log_is_empty_and_makes_its_directory(tmp_path: Path) -> None:
    """The first coordinator has term 1, wherever the run directory is to be."""
    with Log.open(tmp_path / "runs" / "new", job=JOB) as log:
        assert (log.records, log.term, log.torn) == ((), 1, b"")


def test_people_can_read_it(file: Path) -> None:
    """Every line is a JSON object of one thing and its checksum; the first names format and job."""
    lines = [json.loads(line) for line in file.read_text(encoding="ascii").splitlines()]
    assert [next(iter(line)) for line in lines] == ["log", "start", "record", "record", "record"]
    assert all(list(line)[1:] == ["xxh3"] for line in lines)
    assert lines[0]["log"] == {"format": 1, "job": JOB}
    assert lines[1]["start"]["pid"] == os.getpid()
    assert tuple(line["record"] for line in lines[2:]) == RECORDS


def test_a_record_that_would_come_back_as_another_is_refused(tmp_path: Path) -> None:
    """Nothing is turned into something else in silence, and the log goes on."""
    with Log.open(tmp_path, job=JOB) as log:
        for record in ({"a": (1, 2)}, {"a": {1: 2}}, {"a": float("nan")}, {"a": float("inf")}, {"a": b""}, {"a": {1, 2}}):
            with pytest.raises((TypeError, ValueError)):
                log.append(record)
        log.append({"a": 1})
    assert reopened(tmp_path / "coordinator.log")[0] == ({"a": 1},)


def test_without_a_directory_nothing_is_kept_and_all_else_is_the_same() -> None:
    """The first term each time; what a file would refuse is refused."""
    for _ in range(2):
        with Log.open(None, job=JOB) as log:
            log.append({"a": 1})
            assert (log.records, log.term, log.torn) == ((), 1, b"")
            with pytest.raises(TypeError):
                log.append({"a": (1, 2)})
    with pytest.raises(StorageError, match="closed"):
        log.append({"a": 1})


def test_a_torn_last_line_is_cut_off_at_whatever_byte(file: Path) -> None:
    """All before it is there, the bytes are handed out, and the log goes on behind the last whole line."""
    whole = file.read_bytes()
    begin = whole.rindex(b"\n", 0, -1) + 1
    for end in range(begin, len(whole)):
        file.write_bytes(whole[:end])
        with Log.open(file.parent, job=JOB) as log:
            assert (log.records, log.term, log.torn) == (RECORDS[:-1], 2, whole[begin:end])
            log.append({"more": 1})
        assert reopened(file) == ((*RECORDS[:-1], {"more": 1}), 3, b"")
        assert file.read_bytes().startswith(whole[:begin])


def test_a_start_that_was_torn_has_not_happened(file: Path) -> None:
    """Wherever the first coordinator was killed while it made the file, the next is the first."""
    whole = b"".join(file.read_bytes().splitlines(keepends=True)[:2])
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        assert reopened(file) == ((), 1, whole[whole.rfind(b"\n", 0, end) + 1 : end])
        assert reopened(file) == ((), 2, b"")


def test_the_line_before_the_end_is_written_once_more(file: Path) -> None:
    """It may never have reached the disk; written again it is the same, byte for byte."""
    whole = file.read_bytes()
    reopened(file)
    assert file.read_bytes().startswith(whole)


def test_a_change_of_any_byte_before_the_last_line_is_noticed(file: Path) -> None:
    """Path and line number are named, the file is left as it is, and nothing is skipped."""
    whole = file.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for place in range(last):
        for change in (1 << place % 8, 0x20, 0xFF):
            damaged = bytearray(whole)
            damaged[place] ^= change
            file.write_bytes(damaged)
            number = whole.count(b"\n", 0, place) + 1
            with pytest.raises(StorageError) as caught:
                Log.open(file.parent, job=JOB)
            assert str(caught.value).startswith(f"{file}, line {number}: ")
            assert file.read_bytes() == damaged


@pytest.mark.parametrize("order", [(0, 1, 3, 4), (0, 1, 2, 2, 3, 4), (0, 1, 3, 2, 4), (1, 2, 3, 4), (0, 0, 1, 2, 3, 4)])
def test_lines_that_are_missing_repeated_or_moved_are_noticed(file: Path, order: tuple[int, ...]) -> None:
    """Each of them is whole, so only the chain of checksums tells."""
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[index] for index in order))
    with pytest.raises(StorageError, match=r"coordinator\.log, line [1-4]: .*put back a copy"):
        Log.open(file.parent, job=JOB)


def test_a_file_that_is_no_log_is_left_alone(tmp_path: Path) -> None:
    """Text without a line end is not taken for a torn start."""
    file = tmp_path / "coordinator.log"
    file.write_text("notes")
    with pytest.raises(ConfigError, match="is not a coordinator's log"):
        Log.open(tmp_path, job=JOB)
    assert file.read_text() == "notes"


def test_a_log_of_another_job_is_refused(file: Path) -> None:
    """Path, expected, found, and what to do."""
    with pytest.raises(ConfigError, match=rf"{file}: expected the log of job 'ab', found that of job '{JOB}'; name the run"):
        Log.open(file.parent, job="ab")
    assert reopened(file)[1] == 2  # the one that was refused has not started


def test_a_log_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that writes another format says so in the first line."""
    with monkeypatch.context() as later:
        later.setattr("ps_accordion.coordinator.log.FORMAT", 2)
        Log.open(tmp_path, job=JOB).close()
    with pytest.raises(ConfigError, match="expected a log of format 1, found 2; go on with the release that wrote it"):
        Log.open(tmp_path, job=JOB)


def test_two_coordinators_never_write_to_one_log(file: Path) -> None:
    """The second is told which process holds it; after the first has closed it may."""
    with (
        Log.open(file.parent, job=JOB) as log,
        pytest.raises(ConfigError, match=rf"{file}: another coordinator .* process {os.getpid()} on .*; end that one first"),
    ):
        Log.open(file.parent, job=JOB)
    log.close()
    assert reopened(file) == (RECORDS, 3, b"")


def test_a_closed_log_takes_no_record(file: Path) -> None:
    """Closing twice is harmless, and what comes after is not lost in silence."""
    log = Log.open(file.parent, job=JOB)
    log.close()
    log.close()
    with pytest.raises(StorageError, match="closed"):
        log.append({"a": 1})


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_after_a_failed_append_nothing_is_taken_until_it_is_opened_again(
    file: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A record that was refused is not there later, even where the system had taken its bytes."""

    def fails(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with Log.open(file.parent, job=JOB) as log:
        with monkeypatch.context() as broken:
            broken.setattr(os, call, fails)
            with pytest.raises(StorageError, match=rf"{file}: .*Input/output error; make room"):
                log.append({"refused": 1})
        with pytest.raises(StorageError, match="open the log again"):
            log.append({"after": 1})
    assert reopened(file) == (RECORDS, 3, b"")


FULL = """
import resource, sys
from pathlib import Path
from ps_accordion.coordinator.log import Log
from ps_accordion.errors import StorageError
directory, limit = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
taken = 0
try:
    with Log.open(directory, job="9d1c") as log:
        while True:
            log.append({"number": taken})
            taken += 1
except StorageError as error:
    print(taken, error)
"""


@pytest.mark.parametrize("room", [0, 40, 150, 1000, 1001, 1002])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, room: int) -> None:
    """Wherever the room ends, in making the file or in a record, all that was taken is there and nothing else."""
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path, str(room)], capture_output=True, text=True, timeout=100)
    taken, _, message = done.stdout.partition(" ")
    assert message.startswith(f"{tmp_path}/coordinator.log: the coordinator's log cannot be read or written: File too large")
    with Log.open(tmp_path, job=JOB) as log:
        assert log.records == tuple({"number": number} for number in range(int(taken)))


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    """A file stands in its place."""
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError, match=r"run/coordinator\.log: .*; make room or give access"):
        Log.open(tmp_path / "run", job=JOB)


def test_every_append_is_synced_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file at every start and record, and the directories above it when it is made."""
    synced = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.append("directory" if stat.S_ISDIR(status.st_mode) else status.st_size)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    file = tmp_path / "run" / "coordinator.log"
    with Log.open(file.parent, job=JOB) as log:
        assert synced == ["directory", file.stat().st_size, "directory"]
        for number in range(3):
            log.append({"number": number})
            assert synced[-1] == file.stat().st_size
        assert len(synced) == 6


CHILD = """
import os, sys
from pathlib import Path
from ps_accordion.coordinator.log import Log
with Log.open(Path(sys.argv[1]), job="9d1c") as log:
    number = len(log.records)
    while True:
        log.append({"number": number, "filling": "x" * (number * 37 % 300)})
        os.write(1, b"%d\\n" % number)
        number += 1
"""


def test_a_killed_coordinator_leaves_all_that_it_had_acknowledged(tmp_path: Path) -> None:
    """Eight times, at moments that its own progress chooses; at most one record more is there, the one it was writing."""
    there = 0
    for term in range(1, 9):
        with subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for _ in range(7 * term):
                child.stdout.readline()
            child.send_signal(signal.SIGKILL)
            rest = child.stdout.read().split()
        acknowledged = int(rest[-1]) + 1 if rest else there + 7 * term
        with Log.open(tmp_path, job=JOB) as log:
            assert log.term == 2 * term
            assert [record["number"] for record in log.records] == list(range(len(log.records)))
            there = len(log.records)
        assert acknowledged <= there <= acknowledged + 1
