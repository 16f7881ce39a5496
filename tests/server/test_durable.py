"""The memory of a shard: what a killed server finds again, and when it says that something is lost."""

import json
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

import kills
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps_accordion.errors import ConfigError, StorageError
from ps_accordion.server.durable import KeySize, ShardStore, Stored, mapped, store
from ps_accordion.server.durable.keys import MAX_KEY_HEADER
from ps_accordion.server.durable.store import MAX_SHARD_RECORD

TABLE = b"a table"
SIZES = [KeySize(1000, 4000, 100), KeySize(33, 64)]
KILLS = 120
"""A kill takes about 25 ms, most of it in the disk's own time for an open and a close."""


@pytest.fixture
def directory(tmp_path):
    """Give a directory that is not there yet."""
    return tmp_path / "state"


def opened(directory, *, shard=0, job="job"):
    return ShardStore.open(directory, shard=shard, job=job)


def fill(directory, *, killed=False):
    """Make a memory with one layout and something in it; return its boot.

    A killed process leaves what its files hold at that moment, closed or not: a copy of them.
    """
    with opened(directory) as shard:
        shard.write_record(b"promise")
        keys = shard.add_layout(0, TABLE, SIZES)
        for number, key in enumerate(keys):
            key.halves[0].fill(number + 0.25)
            key.halves[1].fill(number + 0.5)
            key.store(b"older", [b"x" * 64])
            key.store(b"newer", [b"y" * 32, b"z" * 16], b"plan" * (number == 0))
        if killed:
            shutil.copytree(directory, directory.with_name("killed"))
        boot = shard.boot
        del keys, key
    if killed:
        shutil.rmtree(directory)
        directory.with_name("killed").rename(directory)
    return boot


def is_whole(shard):
    """Compare with what `fill` has left."""
    keys = shard.add_layout(0, TABLE, SIZES)
    assert (shard.fresh, shard.lost, shard.record, shard.layouts) == (False, "", b"promise", {0: TABLE})
    assert [key.load() for key in keys] == [
        Stored(b"newer", (b"y" * 32, b"z" * 16), b"plan"),
        Stored(b"newer", (b"y" * 32, b"z" * 16), b""),
    ]
    for number, key in enumerate(keys):
        assert (key.halves[0] == number + 0.25).all()
        assert (key.halves[1] == number + 0.5).all()
    return True


def is_blank(shard, *, reason):
    """Compare with a memory that was made because another was lost."""
    assert (shard.fresh, shard.record, shard.layouts) == (True, b"", {})
    assert reason in shard.lost
    keys = shard.add_layout(0, TABLE, SIZES)
    assert [key.load() for key in keys] == [None, None]
    assert not any(half.any() for key in keys for half in key.halves)
    return True


def change(path, place, flip=1):
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_SET if place >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ flip]))


def machine_starts_anew(monkeypatch, tmp_path, name="another start"):
    monkeypatch.setattr(store, "KERNEL_BOOT", tmp_path / "boot_id")
    if name:
        (tmp_path / "boot_id").write_text(name + "\n")


# ---------------------------------------------------------------- a memory


@pytest.mark.parametrize("durable", [False, True])
def test_a_new_memory_is_empty(directory: Path, durable: bool) -> None:
    """With a boot of its own, zero residuals, and no records; on disk or not makes no difference."""
    with opened(directory if durable else None) as shard, opened(None) as other:
        assert is_blank(shard, reason="")
        assert shard.lost == ""
        assert 0 < shard.boot < 1 << 63
        assert shard.boot != other.boot
        for key, size in zip(shard.add_layout(0, TABLE, SIZES), SIZES, strict=True):
            for half in key.halves:
                assert (half.dtype, half.shape, half.flags.c_contiguous) == (np.float32, (size.elements,), True)
                assert half.flags.writeable
                assert half.ctypes.data % 16 == 0
            key.store(b"header", [b"frame"])
            assert key.load() == Stored(b"header", (b"frame",), b"")
        shard.write_record(b"once")
        shard.write_record(b"twice")
        assert shard.record == b"twice"
    assert directory.exists() == durable


@pytest.mark.parametrize("killed", [False, True])
def test_a_restarted_process_finds_everything(directory: Path, killed: bool) -> None:
    """Boot, record, layouts with their tables, residuals and the last result of each key; again and again."""
    boot = fill(directory, killed=killed)
    for _ in range(3):
        with opened(directory) as shard:
            assert shard.boot == boot
            assert is_whole(shard)


def test_halves_are_the_file(directory: Path) -> None:
    """A kernel that writes a half has stored it: no copy, no call."""
    with opened(directory) as shard:
        key = shard.add_layout(0, TABLE, SIZES)[0]
        key.halves[1][:] = np.arange(1000)
        assert np.arange(1000, dtype=np.float32).tobytes() in (directory / "shard-0-layout-0.state").read_bytes()
        assert not key.halves[0].any()


def test_a_layout_is_added_once(directory: Path) -> None:
    """The same stores come back; a process that has restarted adds it again to get at them."""
    for _ in range(2):
        with opened(directory) as shard:
            keys = shard.add_layout(3, TABLE, SIZES)
            assert shard.add_layout(3, bytes(TABLE), tuple(SIZES)) is keys
            assert shard.layouts == {3: TABLE}


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize(("table", "sizes"), [(b"another", SIZES), (TABLE, SIZES[:1]), (TABLE, [SIZES[0], KeySize(33, 65)])])
def test_another_layout_of_the_same_number_is_refused(directory: Path, durable: bool, table, sizes) -> None:
    """Both digests are named, and what is stored stays."""
    with opened(directory if durable else None) as shard:
        keys = shard.add_layout(0, TABLE, SIZES)
        with pytest.raises(ConfigError, match=r"expected layout 0 with digest [0-9a-f]{16}, .* got one with digest [0-9a-f]{16}"):
            shard.add_layout(0, table, sizes)
        assert shard.add_layout(0, TABLE, SIZES) is keys


def test_a_layout_may_have_no_key_for_this_shard(directory: Path) -> None:
    """A small model on many shards; the table is kept all the same."""
    for _ in range(2):
        with opened(directory) as shard:
            assert shard.add_layout(0, TABLE, []) == []
            assert shard.layouts == {0: TABLE}


def test_several_shards_and_layouts_share_a_directory(directory: Path) -> None:
    """Shard 1 and layout 1 are not shard 11 and layout 11."""
    for _ in range(2):
        with opened(directory, shard=1) as first, opened(directory, shard=11) as second:
            assert not first.lost + second.lost
            for shard, layouts in ((first, (1, 11)), (second, (1,))):
                for layout in layouts:
                    key = shard.add_layout(layout, TABLE, SIZES)[0]
                    mark = struct.pack("<QI", shard.boot, layout)
                    assert key.load() in (None, Stored(mark, (), b""))
                    key.store(mark)
    assert not list(directory.glob("*.bad"))


def test_what_is_too_long_is_refused() -> None:
    """By what was reserved for each part, so that it does not depend on the others; the record stands."""
    with opened(None) as shard:
        key = shard.add_layout(0, TABLE, SIZES)[0]
        key.store(bytes(MAX_KEY_HEADER), [bytes(2000), bytes(2000)], bytes(100))
        for parts in ((bytes(MAX_KEY_HEADER + 1),), (b"", [bytes(2000), bytes(2001)]), (b"", [], bytes(101))):
            with pytest.raises(StorageError, match="at most"):
                key.store(*parts)
        assert key.load() == Stored(bytes(MAX_KEY_HEADER), (bytes(2000), bytes(2000)), bytes(100))
        shard.write_record(bytes(MAX_SHARD_RECORD))
        with pytest.raises(StorageError, match="at most"):
            shard.write_record(bytes(MAX_SHARD_RECORD + 65))
        assert shard.record == bytes(MAX_SHARD_RECORD)


@pytest.mark.parametrize("durable", [False, True])
def test_a_closed_memory_is_not_written(directory: Path, durable: bool) -> None:
    """Closing twice is harmless; the halves stay readable for whoever still holds one."""
    shard = opened(directory if durable else None)
    key = shard.add_layout(0, TABLE, SIZES)[0]
    key.halves[0].fill(2)
    key.store(b"x")
    shard.write_record(b"x")
    shard.close()
    shard.close()
    for use in (lambda: key.store(b"x"), key.load, lambda: shard.write_record(b"x"), lambda: shard.record):
        with pytest.raises(ValueError, match="released"):
            use()
    assert (key.halves[0] == 2).all()


def test_a_store_takes_no_memory_of_the_payload_s_size() -> None:
    """It is on the path of every round: a copy to where it stays, and a checksum there."""
    with opened(None) as shard:
        key = shard.add_layout(0, TABLE, [KeySize(1, 1 << 20)])[0]
        frame = bytes(1 << 20)
        tracemalloc.start()
        try:
            key.store(b"header", [frame])
            assert tracemalloc.get_traced_memory()[1] < 1 << 14
        finally:
            tracemalloc.stop()


# ---------------------------------------------------------------- kills


def test_a_kill_at_any_moment_leaves_the_last_finished_state(tmp_path: Path) -> None:
    """Real processes, real SIGKILL, while opening, storing and closing: nothing is lost, nothing is half there."""
    program = [sys.executable, kills.__file__, str(tmp_path / "state"), str(KILLS), "7"]
    alone = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # it forks, which newer Pythons do not like beside threads
    run = subprocess.run(program, capture_output=True, text=True, timeout=100, check=False, env=alone)
    assert (run.returncode, run.stderr) == (0, "")
    said = json.loads(run.stdout)
    assert sum(said["kills"].values()) == KILLS
    assert said["checks"] > KILLS * 3 // 4
    assert not list((tmp_path / "state").glob("*.bad"))


def test_a_torn_write_gives_the_record_before_it(directory: Path) -> None:
    """Of a killed process, whatever block of the newer slot is damaged: the older record, and nothing is lost."""
    fill(directory, killed=True)
    path = directory / "shard-0-layout-0.state"
    content = path.read_bytes()
    start = content.index(b"newer") - 128  # of the first key's newer slot
    for block in range(start, start + 128 + len(b"newer") + 32 + 16 + 4, 64):
        path.write_bytes(content[:block] + bytes(byte ^ 0xFF for byte in content[block : block + 64]) + content[block + 64 :])
        unpacked = directory.with_name("torn")
        shutil.copytree(directory, unpacked)
        with opened(unpacked) as shard:
            assert not shard.lost
            first, second = shard.add_layout(0, TABLE, SIZES)
            assert first.load() == Stored(b"older", (b"x" * 64,), b"")
            assert second.load() == Stored(b"newer", (b"y" * 32, b"z" * 16), b"")
        shutil.rmtree(unpacked)


ACTIONS = st.one_of(
    st.tuples(st.just("reopen"), st.just(0), st.just(0)),
    st.tuples(st.just("kill"), st.just(0), st.just(0)),
    st.tuples(st.just("record"), st.integers(0, 200), st.integers(0, 255)),
    st.tuples(st.just("store"), st.sampled_from(kills.KEYS), st.integers(0, 1 << 20)),
    st.tuples(st.just("half"), st.sampled_from(kills.KEYS), st.integers(0, 1 << 20)),
)


@settings(max_examples=30)
@given(st.lists(ACTIONS, max_size=25))
def test_it_is_a_dictionary_that_outlives_its_process(actions) -> None:
    """Any sequence of stores, closes and kills gives what a dictionary would."""
    records, halves, record = {}, {}, b""
    with TemporaryDirectory() as base:
        directory = Path(base, "0")
        shard = opened(directory)
        boot = shard.boot
        for number, (action, where, value) in enumerate([*actions, ("kill", 0, 0), ("reopen", 0, 0)]):
            keys = {(layout, key): each for layout in kills.SIZES
                    for key, each in enumerate(shard.add_layout(layout, kills.TABLES[layout], kills.SIZES[layout]))}  # fmt: skip
            if action == "store":
                header, frames, plan = kills.contents(value, kills.SIZES[where[0]][where[1]])
                keys[where].store(header, frames, plan)
                records[where] = Stored(header, tuple(frames), plan)
            elif action == "half":
                keys[where].halves[value % 2].fill(value)
                halves[where, value % 2] = value
            elif action == "record":
                record = bytes([value]) * where
                shard.write_record(record)
            else:
                if action == "kill":
                    shutil.copytree(directory, Path(base, str(number + 1)))
                    directory = Path(base, str(number + 1))
                del keys
                shard.close()
                shard = opened(directory)
                assert (shard.boot, shard.lost, shard.record, shard.layouts) == (boot, "", record, kills.TABLES)
                for layout, sizes in kills.SIZES.items():
                    for key, each in enumerate(shard.add_layout(layout, kills.TABLES[layout], sizes)):
                        assert each.load() == records.get((layout, key))
                        for side, half in enumerate(each.halves):
                            assert (half == halves.get(((layout, key), side), 0)).all()
        shard.close()


def test_a_layout_that_was_being_added_is_added_again(directory: Path) -> None:
    """A kill before the shard's file knows of it leaves a file that nobody has used."""
    fill(directory)
    shutil.copy(directory / "shard-0-layout-0.state", directory / "shard-0-layout-1.state")
    (directory / "shard-0-layout-2.state.new").write_bytes(b"half")
    with opened(directory) as shard:
        assert is_whole(shard)
        for number in (1, 2):
            keys = shard.add_layout(number, TABLE, SIZES)
            assert [key.load() for key in keys] == [None, None]
            assert not any(half.any() for key in keys for half in key.halves)
    with opened(directory) as shard:
        assert list(shard.layouts) == [0, 1, 2]


# ---------------------------------------------------------------- lost


def test_a_machine_that_stopped_has_lost_what_was_not_closed(directory: Path, monkeypatch, tmp_path: Path) -> None:
    """Pages reach a disk in any order, so nothing of it can be trusted; the residual is not silently a mixture."""
    boot = fill(directory, killed=True)
    machine_starts_anew(monkeypatch, tmp_path)
    with opened(directory) as shard:
        assert is_blank(shard, reason="was not closed before the machine started anew")
        assert "another start now" in shard.lost
        assert shard.boot != boot
    assert {path.name for path in directory.glob("*.bad")} == {"shard-0.state.bad", "shard-0-layout-0.state.bad"}


def test_a_machine_that_does_not_tell_its_start_is_not_trusted(directory: Path, monkeypatch, tmp_path: Path) -> None:
    """Two starts that are both unknown are not the same one."""
    machine_starts_anew(monkeypatch, tmp_path, name="")
    fill(directory, killed=True)
    with opened(directory) as shard:
        assert is_blank(shard, reason="unknown then, unknown now")


def test_what_was_closed_outlives_the_machine_s_start(directory: Path, monkeypatch, tmp_path: Path) -> None:
    """Everything was written to the disk, and every byte is compared with its checksum."""
    boot = fill(directory)
    machine_starts_anew(monkeypatch, tmp_path)
    with opened(directory) as shard:
        assert shard.boot == boot
        assert is_whole(shard)


def test_what_was_opened_after_a_close_is_not_closed(directory: Path, monkeypatch, tmp_path: Path) -> None:
    """The mark goes when the memory is opened, not when something is stored."""
    fill(directory)
    with opened(directory):
        shutil.copytree(directory, tmp_path / "killed")
    machine_starts_anew(monkeypatch, tmp_path)
    with opened(tmp_path / "killed") as shard:
        assert is_blank(shard, reason="was not closed")


@pytest.mark.parametrize(
    ("name", "place"),
    [("shard-0.state", 30), ("shard-0.state", -1)] + [("shard-0-layout-0.state", place) for place in (30, 200, 5000, -1)],
)
def test_a_closed_file_that_has_changed_is_lost(directory: Path, name: str, place: int) -> None:
    """A byte of a label, a residual or a record, used or not."""
    fill(directory)
    change(directory / name, place)
    with opened(directory) as shard:
        assert is_blank(shard, reason=f"{name} ")


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("size", [0, 20, 64, 5000, -1])
@pytest.mark.parametrize("name", ["shard-0.state", "shard-0-layout-0.state"])
def test_a_file_that_was_cut_short_is_lost(directory: Path, name: str, size: int, killed: bool) -> None:
    """All of the shard is, because a shard is whole or blank; the file is kept aside as it is."""
    fill(directory, killed=killed)
    path = directory / name
    os.truncate(path, size % path.stat().st_size)
    content = path.read_bytes()
    with opened(directory) as shard:
        assert is_blank(shard, reason=f"{path} ")
    assert path.with_name(f"{name}.bad").read_bytes() == content


def test_a_record_with_two_wrong_checksums_is_lost(directory: Path) -> None:
    """It is never taken for one that was not written."""
    fill(directory, killed=True)
    path = directory / "shard-0-layout-0.state"
    for word in (b"older", b"newer"):
        change(path, path.read_bytes().index(word))
    with opened(directory) as shard:
        assert is_blank(shard, reason=f"{path}: both copies of a record")


@pytest.mark.parametrize(
    ("name", "reason"), [("shard-0-layout-0.state", "layout-0.state is gone"), ("shard-0.state", "is gone, and")]
)
def test_a_file_that_is_gone_is_lost(directory: Path, name: str, reason: str) -> None:
    """A memory without one of its files is not a memory with fewer keys."""
    fill(directory)
    (directory / name).unlink()
    with opened(directory) as shard:
        assert is_blank(shard, reason=reason)


def test_a_file_of_another_boot_is_lost(directory: Path, tmp_path: Path) -> None:
    """A layout's file from an older memory of the same shard is not ours."""
    fill(directory)
    fill(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "shard-0-layout-0.state", directory)
    with opened(directory) as shard:
        assert is_blank(shard, reason="belongs to boot")


def test_a_loss_is_repeated_until_somebody_has_taken_note(directory: Path) -> None:
    """A process that is killed before it could say so leaves it to the next."""
    fill(directory)
    (directory / "shard-0-layout-0.state").unlink()
    with opened(directory) as shard:
        lost = shard.lost
    for _ in range(2):
        with opened(directory) as shard:
            assert (shard.fresh, shard.lost) == (False, lost)
    with opened(directory) as shard:
        shard.write_record(b"noted")
    with opened(directory) as shard:
        assert shard.lost == ""


# ---------------------------------------------------------------- refused


def test_the_state_of_another_job_is_refused(directory: Path) -> None:
    """With both digests and what to do; nothing is touched."""
    fill(directory)
    before = {path: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(ConfigError, match=r"expected the state of job [0-9a-f]{16} in .*shard-0.state, found .* name another"):
        opened(directory, job="another")
    assert {path: path.read_bytes() for path in directory.iterdir()} == before
    with opened(directory) as shard:
        assert is_whole(shard)


@pytest.mark.parametrize("name", ["shard-0.state", "shard-0-layout-0.state"])
def test_another_format_is_refused(directory: Path, monkeypatch, name: str) -> None:
    """Another release may still be able to read it, so it is not set aside."""
    monkeypatch.setattr(mapped, "FORMAT_VERSION", 2)
    fill(directory)
    monkeypatch.undo()
    if name != "shard-0.state":  # the shard's own file is the first that is looked at
        fill(directory.with_name("ours"))
        other, directory = directory, directory.with_name("ours")
        shutil.copy(other / name, directory)
    with pytest.raises(ConfigError, match=rf"expected format version 1 in .*{name}, found version 2"):
        opened(directory)
    assert not list(directory.glob("*.bad"))


def test_the_files_of_another_shard_are_refused(directory: Path) -> None:
    """Somebody has renamed them."""
    fill(directory)
    (directory / "shard-0.state").rename(directory / "shard-1.state")
    with pytest.raises(ConfigError, match=r"expected shard 1 in .*, found shard 0"):
        opened(directory, shard=1)


def test_two_processes_do_not_share_a_memory(directory: Path) -> None:
    """The second is told which file and which process; after a close the memory is free."""
    with opened(directory):
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} holds .*shard-0.lock"):
            opened(directory)
        with opened(directory, shard=1) as other:
            assert other.fresh
    with opened(directory) as shard:
        assert not shard.fresh


def test_a_process_that_cannot_open_lets_go(directory: Path) -> None:
    """What stands in the way may be removed, and the next try succeeds in the same process."""
    (directory / "shard-0.state").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"shard-0.state cannot be used: Is a directory"):
        opened(directory)
    (directory / "shard-0.state").rmdir()
    with opened(directory) as shard:
        assert shard.fresh


@pytest.mark.parametrize("below", [".", "below"])
def test_a_file_in_the_directory_s_place_is_refused(tmp_path: Path, below: str) -> None:
    """At the end of the path or within it."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be used: it is not a directory; name a directory"):
        opened(tmp_path / "file" / below)


def test_a_directory_where_nothing_can_be_made_is_refused() -> None:
    """Modes do not stop root, but nobody makes a directory in /proc."""
    with pytest.raises(
        ConfigError, match=r"/proc/state cannot be used: .*; name a directory that this process may make and write"
    ):
        opened(Path("/proc/state"))


LIMITED = """
import resource, signal, sys
from pathlib import Path
from ps_accordion.errors import StorageError
from ps_accordion.server.durable import KeySize, ShardStore

shard = ShardStore.open(Path(sys.argv[1]), shard=0, job="job")
small = shard.add_layout(0, b"small", [KeySize(10, 10)])[0]
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    shard.add_layout(1, b"large", [KeySize(1 << 20, 10)])
except StorageError as error:
    print(error.exit_code, error)
small.store(b"still", [b"here"])
shard.close()
try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    ShardStore.open(Path(sys.argv[1]), shard=1, job="job")
except StorageError as error:
    print(error.exit_code, error)
"""


def test_a_full_disk_is_an_error_before_training(directory: Path) -> None:
    """With the size and what is free, and nothing half made is left; what is stored already goes on."""
    run = subprocess.run([sys.executable, "-c", LIMITED, str(directory)], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    layout, shard = run.stdout.splitlines()
    assert layout.startswith("8 expected room for ")
    assert "bytes of " in layout
    assert "shard-0-layout-1.state, got 'File too large', and " in layout
    assert "bytes are free; " in layout
    assert shard.startswith("8 expected room for ")
    assert sorted(path.name for path in directory.iterdir()) == [
        "shard-0-layout-0.state", "shard-0.lock", "shard-0.state", "shard-1.lock",
    ]  # fmt: skip
    with opened(directory) as store_:
        assert store_.add_layout(0, b"small", [KeySize(10, 10)])[0].load() == Stored(b"still", (b"here",), b"")
