"""When a shard's memory is lost, which it says, and when it is not ours, which it refuses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from memories import change, fill, is_blank, is_whole, machine_starts_anew, opened

from ps_accordion.errors import ConfigError
from ps_accordion.server.durable import KeySize, Stored, mapped

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
