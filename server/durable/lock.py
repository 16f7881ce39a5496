"""One process has a shard's files open. The lock is a file of its own, because the others may be replaced."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from ps_accordion.errors import ConfigError

from .mapped import explained

__all__ = ["Lock"]


class Lock:
    """Holds `path` until it is closed; the system lets go of it when the process ends, however it ends.

    Args:
        path: A file, made if it is not there. It stays, empty, when the lock is closed.
        what: What is held, for the message.

    Raises:
        ConfigError: Another process holds it (or this one, by another object), or the file cannot be made.
        StorageError: There is no space, or the file system knows no locks.
    """

    def __init__(self, path: Path, what: str) -> None:
        with explained(path):
            self._file = path.open("a+", encoding="ascii")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._file.truncate(0)
                self._file.write(f"{os.getpid()}\n")
                self._file.flush()
            except BlockingIOError:
                self._file.seek(0)
                holder = self._file.read(16).strip()
                self._file.close()
                raise ConfigError(
                    f"expected {what} to be free, but process {holder or 'unknown'} holds {path}; end that process, or name "
                    "another directory"
                ) from None
            except BaseException:
                self._file.close()
                raise

    def discard(self) -> None:
        """Let go of it and remove the file: what it stood for is gone."""
        with suppress(OSError):
            Path(self._file.name).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go. Closing twice is harmless."""
        if not self._file.closed:
            with suppress(OSError):
                self._file.truncate(0)
            self._file.close()
