"""Memories of a shard in a directory, and what may befall them, for the tests of durable state."""

import os
import shutil

from ps_accordion.server.durable import KeySize, ShardStore, Stored, store

TABLE = b"a table"
SIZES = [KeySize(1000, 4000, 100), KeySize(33, 64)]


def opened(directory, *, shard=0, job="job"):
    """Open the memory of a shard."""
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
    """Flip bits of one byte of a file; a place below zero counts from its end."""
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_SET if place >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ flip]))


def machine_starts_anew(monkeypatch, tmp_path, name="another start"):
    """Let the machine say that it has been started again; without a name it does not say when it was."""
    monkeypatch.setattr(store, "KERNEL_BOOT", tmp_path / "boot_id")
    if name:
        (tmp_path / "boot_id").write_text(name + "\n")
