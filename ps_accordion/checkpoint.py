"""Checkpoints of a whole job on the disk: a folder a step, which is complete or not there.

    step-00000040/               made as step-00000040.partial, and renamed when all of it is on the disk
        manifest.json            where each layout stands, the terms of the job, and size and xxh3-128 of every part
        model-0.safetensors      parameters and buffers of layout 0 by name, for `safetensors.torch.load_file`
        training.safetensors     optimizers, schedulers and scalers
        worker-0.safetensors     what a worker has for itself: residuals, velocities, sums of the open window, generators
        shard-0.safetensors      residuals of a shard, by tensor and place in it
        coordinator.msgpack      planners and policies

Tensors are in the safetensors format and the rest is JSON or msgpack: reading any of it runs no code.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from .errors import ConfigError, StorageError

__all__ = [
    "MANIFEST",
    "LayoutAt",
    "Manifest",
    "Part",
    "commit",
    "complete",
    "find",
    "folder",
    "lacking",
    "part_named",
    "partial",
    "parts_named",
    "read",
    "read_part",
    "worker_file",
    "write_part",
]

FORMAT = 1
MANIFEST = "manifest.json"
_PARTIAL = ".partial"


class Part(msgspec.Struct, frozen=True, array_like=True):
    """One file of a checkpoint.

    Attributes:
        file: Its name.
        nbytes: Its size in bytes.
        digest: Its xxh3-128, 32 hexadecimal digits.
    """

    file: str
    nbytes: int
    digest: str


class LayoutAt(msgspec.Struct, frozen=True):
    """Where a layout stands.

    Attributes:
        number: Of the layout.
        round: The round that comes next; all before it are in.
        table: The tensor table, as `Layout.table`.
    """

    number: int
    round: int
    table: bytes


class Manifest(msgspec.Struct, frozen=True):
    """What a checkpoint consists of.

    Attributes:
        step: Steps that it has behind it: rounds of the first layout.
        terms: The terms of the job, by dotted name.
        layouts: Where each layout stands.
        parts: All files but the manifest.
        format: Number of this way of writing it.
    """

    step: int
    terms: dict[str, Any]
    layouts: list[LayoutAt]
    parts: list[Part]
    format: int = FORMAT

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def layout(self, number: int) -> LayoutAt | None:
        """Return where a layout stands; None where it did not exist."""
        return next((layout for layout in self.layouts if layout.number == number), None)

    def refuse_other_terms(self, terms: Mapping[str, Any], *, where: Path) -> None:
        """Refuse to go on under terms that change numbers; servers may be others.

        Raises:
            ConfigError: A term differs.
        """
        for name, here in terms.items():
            if not name.startswith(("servers.", "checkpoint.")) and self.terms.get(name) != here:
                why = "; each worker's residual is its own, and none may be dropped" if name == "workers.count" else ""
                raise ConfigError(
                    f"checkpoint {str(where)!r} was made with {name} = {self.terms.get(name)!r}, and this job has {here!r}{why}; "
                    "set it as it was, or start without checkpoint.resume"
                )

    def refuse_other_workers(self, count: int, *, where: Path) -> None:
        """Refuse to go on with workers of which some have no part in it, or whose parts are not those of all that had one.

        Raises:
            ConfigError: It was made after a worker had left or died, or beside one that came in addition.
        """
        there = {part.file for part in parts_named(self, "worker-")}
        if there != {worker_file(slot) for slot in range(count)}:
            raise ConfigError(
                f"checkpoint {str(where)!r} has {', '.join(sorted(there)) or 'no part of a worker'}, and this job begins with "
                f"workers 0 to {count - 1}; each worker's residual is its own, and none may be dropped: go on from a checkpoint "
                "that was made while exactly these were in the run"
            )


def lacking(members: Collection[int], count: int) -> str:
    """Say why no job could go on from a checkpoint of these workers; empty where one can.

    Args:
        members: Slots of the workers in the run.
        count: `workers.count`: slots 0 to `count` - 1 begin a job, each with a residual of its own.
    """
    if sorted(members) == list(range(count)):
        return ""
    here = ", ".join(str(slot) for slot in sorted(members))
    return (
        f"the run has workers {here}, and a job can only go on from one of workers 0 to {count - 1}, with which it began: each "
        "worker's residual is its own, and none may be dropped. The checkpoints before are still there"
    )


def worker_file(slot: int) -> str:
    """Return the name of the part with what one worker has for itself."""
    return f"worker-{slot}.safetensors"


def folder(root: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return root / f"step-{step:08d}"


def partial(root: Path, step: int) -> Path:
    """Return where it is while it is being made."""
    return root / f"step-{step:08d}{_PARTIAL}"


# ---------------------------------------------------------------- writing


def write_part(directory: Path, file: str, data: bytes) -> Part:
    """Put one file on the disk, whole or not at all; the directory is made where it is missing.

    Raises:
        StorageError: It cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        new = directory / f"{file}.{os.getpid()}.new"
        with new.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(directory / file)
        _sync(directory)
    except OSError as error:
        with contextlib.suppress(OSError, UnboundLocalError):
            new.unlink()
        raise StorageError(
            f"{file!r} of a checkpoint cannot be written to {str(directory)!r}: {error.strerror or error}; "
            "make room there, or name another checkpoint.directory"
        ) from error
    return Part(file, len(data), xxhash.xxh3_128_hexdigest(data))


def commit(root: Path, manifest: Manifest, *, keep: int) -> Path:
    """Make a checkpoint whose parts are all there a complete one, and remove those before it but the last `keep - 1`.

    Returns:
        Its folder.

    Raises:
        StorageError: A part is missing, or the disk fails. What was there before is still there.
    """
    made, done = partial(root, manifest.step), folder(root, manifest.step)
    for part in manifest.parts:
        nbytes = (made / part.file).stat().st_size if (made / part.file).is_file() else None
        if nbytes != part.nbytes:
            raise StorageError(
                f"expected {part.nbytes} bytes of {part.file!r} in {str(made)!r}, "
                f"found {'nothing' if nbytes is None else nbytes}; all processes must see the same checkpoint.directory"
            )
    body = msgspec.json.encode(manifest)
    head = msgspec.json.encode({"xxh3-128": xxhash.xxh3_128_hexdigest(body)})
    write_part(made, MANIFEST, head + b"\n" + body + b"\n")
    try:
        if done.exists():
            shutil.rmtree(done)  # of an earlier try of these steps: what comes now is as good
        made.rename(done)
        _sync(root)
        _prune(root, manifest.step, keep)
    except OSError as error:
        raise StorageError(f"checkpoint {str(done)!r} cannot be put in its place: {error.strerror or error}") from error
    return done


def _prune(root: Path, step: int, keep: int) -> None:
    for old in sorted(root.glob(f"step-*{_PARTIAL}")):
        if old.name < partial(root, step).name:
            shutil.rmtree(old)
    before = [old for old in complete(root) if old.name <= folder(root, step).name]
    for old in before[:-keep]:
        shutil.rmtree(old)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- reading


def read(path: Path) -> Manifest:
    """Return what a complete checkpoint consists of.

    Raises:
        ConfigError: There is none, or it is of another release.
        StorageError: Its manifest is damaged.
    """
    try:
        head, _, rest = (path / MANIFEST).read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"there is no complete checkpoint in {str(path)!r} (no {MANIFEST}); name a folder step-..., or one that has some"
        ) from None
    body = rest.removesuffix(b"\n")
    try:
        if msgspec.json.decode(head) != {"xxh3-128": xxhash.xxh3_128_hexdigest(body)}:
            raise StorageError(f"checkpoint {str(path)!r} is damaged: {MANIFEST} has not the checksum that it names")
        if (known := msgspec.json.decode(body).get("format")) != FORMAT:
            raise ConfigError(f"checkpoint {str(path)!r} is of format {known!r}, this release reads {FORMAT}")
        return msgspec.json.decode(body, type=Manifest)
    except msgspec.DecodeError as error:
        raise StorageError(f"checkpoint {str(path)!r} is damaged: {MANIFEST}: {error}") from None


def read_part(path: Path, part: Part) -> bytes:
    """Return a part's bytes, which are those that were written.

    Raises:
        StorageError: They are not.
    """
    try:
        data = (path / part.file).read_bytes()
    except OSError as error:
        raise StorageError(f"checkpoint {str(path)!r} is damaged: {part.file}: {error.strerror}") from None
    if len(data) != part.nbytes or xxhash.xxh3_128_hexdigest(data) != part.digest:
        raise StorageError(
            f"checkpoint {str(path)!r} is damaged: {part.file} has {len(data)} bytes of {part.nbytes}, or other bytes than were "
            "written (checksum)"
        )
    return data


def find(path: Path) -> tuple[Path, list[str]]:
    """Return the checkpoint to go on from, all of it read and found whole.

    Args:
        path: A checkpoint, or the folder with several, of which the newest whole one counts.

    Returns:
        Its folder, and what is to be said: why newer ones were passed over.

    Raises:
        ConfigError: There is none.
        StorageError: The one that was named is damaged, or all are.
    """
    if (path / MANIFEST).exists() or path.name.startswith("step-"):
        _verify(path)
        return path, []
    known, said = complete(path), list[str]()
    for candidate in reversed(known):
        try:
            _verify(candidate)
        except StorageError as error:
            said.append(str(error))
            continue
        return candidate, [f"{reason}; going on from the one before it, {candidate.name}" for reason in said]
    if said:
        raise StorageError("; ".join(said))
    raise ConfigError(f"there is no complete checkpoint in {str(path)!r}; name the checkpoint.directory of an earlier run")


def _verify(path: Path) -> None:
    for part in read(path).parts:
        read_part(path, part)


def complete(root: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first."""
    return sorted(path for path in root.glob("step-*") if not path.name.endswith(_PARTIAL))


def parts_named(manifest: Manifest, prefix: str) -> Iterator[Part]:
    """Yield the parts whose name begins so."""
    yield from (part for part in manifest.parts if part.file.startswith(prefix))


def part_named(manifest: Manifest, file: str, *, where: Path) -> Part:
    """Return a part by name.

    Raises:
        StorageError: There is none.
    """
    found: Sequence[Part] = [part for part in manifest.parts if part.file == file]
    if not found:
        raise StorageError(f"checkpoint {str(where)!r} has no part {file!r}")
    return found[0]
