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
from memories import SIZES, TABLE, fill, is_blank, is_whole, opened

from ps_accordion.errors import ConfigError, StorageError
from ps_accordion.server.durable import KeySize, Stored
from ps_accordion.server.durable.keys import MAX_KEY_HEADER
from ps_accordion.server.durable.store import MAX_SHARD_RECORD

KILLS = 120
"""A kill takes about 25 ms, most of it in the disk's own time for an open and a close."""

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
