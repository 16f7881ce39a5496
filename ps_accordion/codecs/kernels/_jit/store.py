"""Where object code is kept between processes, and when it is believed.

Under the user's cache directory there is a folder named after the sources of the kernels and of what compiles them, so that an
update of any of them starts afresh. In it lies a file a library; its name tells for which processor, Python, numpy, numba and
llvmlite it was made.

    magic (8 bytes) | XXH3-128 of what the code was made for, and of the code (16 bytes) | object code

To load object code is to run it. So a file is believed only if it belongs to this user and nobody else can write it, whoever can
write the folder: that is asked of the open file, not of its name. The sum is no defence against people but against disks that are
full and processes that are killed; a file that does not fit it is made again.
Writers go through a file of their own and a rename, so a reader sees a whole file or none.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import os
import stat
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import xxhash

__all__ = ["cache_directory", "keep", "read", "turn", "writable"]

_MAGIC = b"psakern1"
_PATIENCE = 60.0
"""Seconds to wait for another process that compiles the same; it takes about ten, on a slow and busy machine a few times that."""


def cache_directory() -> Path | None:
    """Return where compiled kernels are kept, or None where the user has no directory to keep them in."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG rule: a path that is not absolute is ignored.
        base = Path(chosen) if Path(chosen).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "ps-accordion" / "numba" / _digest()


@functools.cache
def _digest() -> str:
    digest = xxhash.xxh3_64()
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _folder() -> Path | None:
    """Return the folder of object code: numba's setting for compiled code holds for ours as well."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    return Path(chosen) / "ps-accordion" / _digest() if chosen else cache_directory()


def _file(library: str) -> Path | None:
    folder = _folder()
    return folder / f"{library}-{xxhash.xxh3_64_hexdigest(_made_for())}.kernels" if folder else None


@functools.cache
def _made_for() -> bytes:
    """Name everything beside the sources that the code of a kernel depends on."""
    # Imported here: a process that never compresses needs neither.
    import llvmlite
    import llvmlite.binding as llvm
    import numpy as np

    parts = (
        sys.version,
        sys.implementation.cache_tag,
        str(object.__basicsize__),
        np.__version__,
        _version_of_numba(),
        llvmlite.__version__,
        llvm.get_process_triple(),
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
    )
    return "\n".join(map(str, parts)).encode()


def _version_of_numba() -> str:
    """Return the version that is installed, without importing it.

    The folder of an installed package's metadata is named after its version. `importlib.metadata` reads it where there is no such
    folder; it is not asked first because its parser of e-mail takes as long to import as all our code takes to load.
    """
    spec = importlib.util.find_spec("numba")
    assert spec is not None
    assert spec.origin is not None
    beside = sorted(folder.name for folder in Path(spec.origin).parents[1].glob("numba-*.dist-info"))
    if beside:
        return " ".join(beside)
    from importlib.metadata import version

    return version("numba")


def _sum(code: bytes) -> bytes:
    return xxhash.xxh3_128_digest(b"%d\n%b%b" % (len(code), _made_for(), code))


def read(library: str) -> bytes | None:
    """Return the object code of a library if it is kept, whole, made for this process, and ours."""
    path = _file(library)
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            ours = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if not (ours and stat.S_ISREG(status.st_mode)):
                return None
            content = file.read()
    except OSError:
        return None  # Whether that matters is seen when the code has been made and is to be kept.
    head = len(_MAGIC)
    code = content[head + 16 :]
    return code if content[: head + 16] == _MAGIC + _sum(code) else None


def keep(library: str, code: bytes) -> None:
    """Keep the object code of a library for other processes; say so once if that cannot be."""
    path = _file(library)
    if path is None or writable(path.parent) is None:
        _say("there is no home directory")
        return
    own = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb") as file:  # noqa: PTH123  # a descriptor, not a path
                file.write(_MAGIC + _sum(code) + code)
            own.replace(path)
        except BaseException:
            own.unlink(missing_ok=True)
            raise
    except OSError as error:
        _say(str(error))


@contextlib.contextmanager
def turn(library: str, *, wait: bool) -> Iterator[bool]:
    """Let one process compile a library while the others wait for what it keeps, instead of all compiling the same.

    Nothing depends on it: where there is no folder or no lock, or the other takes too long, this process goes ahead.

    Args:
        library: What is to be compiled.
        wait: Until another process has compiled it.

    Yields:
        Whether it is this process's turn; always, where it may wait.
    """
    file = _file(library)
    descriptor = None if file is None or writable(file.parent) is None else _opened(file.with_suffix(".turn"))
    if descriptor is None:
        yield True
        return
    try:
        deadline = time.monotonic() + (_PATIENCE if wait else 0.0)
        while not (ours := _locked(descriptor)) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield ours or wait
        if ours and file is not None:
            file.with_suffix(".turn").unlink(missing_ok=True)  # Who waits for it finds what this process has kept.
    finally:
        os.close(descriptor)  # and with it the lock, also when a process is killed


def _opened(file: Path) -> int | None:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # A file system without locks.
    return True


@functools.cache
def writable(folder: Path | None) -> Path | None:
    """Return the folder, made if need be, if files can be made in it; say so if not, and ask only once."""
    if folder is None:
        _say("there is no home directory")
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        _say(str(error))
        return None
    return folder


_said: list[str] = []


def _say(problem: str) -> None:
    if not _said:
        _said.append(problem)
        warnings.warn(
            f"compiled kernels cannot be kept ({problem}), so every start compiles them again for some seconds; "
            "set XDG_CACHE_HOME or NUMBA_CACHE_DIR to a directory that can be written",
            RuntimeWarning,
            stacklevel=2,
        )
