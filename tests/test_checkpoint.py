"""A checkpoint on the disk is whole, or it is refused by name; the one before stays until the next is whole."""

import os

import pytest

from ps_accordion import checkpoint
from ps_accordion.checkpoint import LayoutAt, Manifest
from ps_accordion.errors import ConfigError, StorageError

TERMS = {"seed": 0, "workers.count": 2, "servers.count": 1, "codec.light": 0.1, "checkpoint.resume": ""}
FILES = {"model-0.safetensors": b"parameters", "worker-0.safetensors": b"residuals", "shard-0.safetensors": b""}


def made(root, step, *, keep=2):
    """Complete a checkpoint and return its folder."""
    parts = [checkpoint.write_part(checkpoint.partial(root, step), file, data) for file, data in FILES.items()]
    return checkpoint.commit(root, Manifest(step, TERMS, [LayoutAt(0, step, b"table")], parts), keep=keep)


def flip(file, at=0):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_what_was_written_is_read_again(tmp_path):
    """Manifest and parts come back as they were."""
    path = made(tmp_path, 7)
    manifest = checkpoint.read(path)
    assert (manifest.step, manifest.terms, manifest.layouts) == (7, TERMS, [LayoutAt(0, 7, b"table")])
    assert {part.file: checkpoint.read_part(path, part) for part in manifest.parts} == FILES
    assert manifest.nbytes == sum(map(len, FILES.values()))


def test_the_one_before_is_kept_and_older_ones_go(tmp_path):
    """Two are there from the second on, and a torn one of earlier steps is cleared away."""
    checkpoint.write_part(checkpoint.partial(tmp_path, 5), "worker-0.safetensors", b"torn")
    for step in (9, 10, 200):
        made(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000200"]


def test_one_that_is_not_complete_is_never_taken(tmp_path):
    """A job that dies while it writes goes on from the checkpoint before."""
    whole = made(tmp_path, 10)
    checkpoint.write_part(checkpoint.partial(tmp_path, 20), "model-0.safetensors", b"parameters")
    assert checkpoint.find(tmp_path) == (whole, [])
    with pytest.raises(ConfigError, match="there is no complete checkpoint"):
        checkpoint.find(checkpoint.partial(tmp_path, 20))


@pytest.mark.parametrize("file", [*[file for file, data in FILES.items() if data], checkpoint.MANIFEST])
def test_a_flipped_bit_is_found_and_the_one_before_is_taken_aloud(tmp_path, file):
    """In any file; whoever named the damaged one itself gets no other."""
    before, damaged = made(tmp_path, 10), made(tmp_path, 20)
    flip(damaged / file, at=-3)
    found, said = checkpoint.find(tmp_path)
    assert found == before
    assert len(said) == 1
    assert "step-00000020" in said[0]
    assert "is damaged" in said[0]
    assert said[0].endswith("going on from the one before it, step-00000010")
    with pytest.raises(StorageError, match=r"step-00000020.* is damaged"):
        checkpoint.find(damaged)


@pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: os.truncate(file, 3)])
def test_a_part_that_is_missing_or_torn_is_damage(tmp_path, spoil):
    """The message names the part."""
    path = made(tmp_path, 10)
    spoil(path / "worker-0.safetensors")
    with pytest.raises(StorageError, match=r"worker-0\.safetensors"):
        checkpoint.find(tmp_path)


def test_a_part_that_did_not_reach_the_directory_prevents_the_rename(tmp_path):
    """Where processes see different directories, the job says so, and what was there before is left alone."""
    before = made(tmp_path, 10)
    parts = [checkpoint.Part("worker-1.safetensors", 5, "0" * 32)]
    with pytest.raises(StorageError, match=r"all processes must see the same checkpoint\.directory"):
        checkpoint.commit(tmp_path, Manifest(20, TERMS, [], parts), keep=2)
    assert checkpoint.find(tmp_path) == (before, [])


@pytest.mark.parametrize(("name", "here"), [("codec.light", 0.2), ("workers.count", 3), ("seed", 1)])
def test_other_terms_are_refused_with_both_values(tmp_path, name, here):
    """A residual of a worker that would be left over is not dropped: another number of workers is refused."""
    manifest = checkpoint.read(made(tmp_path, 10))
    with pytest.raises(ConfigError, match=f"{name} = {TERMS[name]!r}, and this job has {here!r}"):
        manifest.refuse_other_terms(TERMS | {name: here}, where=tmp_path)


@pytest.mark.parametrize("count", [2, 3])
def test_parts_of_other_workers_than_those_that_begin_are_refused(tmp_path, count):
    """One that was made after worker 0 had left, or beside one in addition: the terms do not say so."""
    parts = [checkpoint.Part(f"worker-{slot}.safetensors", 9, "0" * 32) for slot in (0, 2)]
    manifest = Manifest(10, TERMS, [], parts)
    said = rf"has worker-0\.safetensors, worker-2\.safetensors, and this job begins with workers 0 to {count - 1}"
    with pytest.raises(ConfigError, match=said):
        manifest.refuse_other_workers(count, where=tmp_path)
    Manifest(10, TERMS, [], [checkpoint.Part("shard-0.safetensors", 9, "0" * 32), parts[0]]).refuse_other_workers(
        1, where=tmp_path
    )


def test_other_servers_are_no_other_terms(tmp_path):
    """A checkpoint goes on with any number of servers, and at other intervals."""
    checkpoint.read(made(tmp_path, 10)).refuse_other_terms(TERMS | {"servers.count": 3, "checkpoint.resume": "x"}, where=tmp_path)


def test_a_directory_without_any_is_refused(tmp_path):
    """So is one that is not there."""
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match="there is no complete checkpoint"):
            checkpoint.find(path)


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    """The error says what to do."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"name another checkpoint\.directory"):
        checkpoint.write_part(tmp_path / "file" / "step", "model-0.safetensors", b"")
