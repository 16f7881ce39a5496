"""Lets Ctrl-C through while backward waits for the network.

Python delivers a signal only between two of its own instructions, and a backward that waits runs none.
The signal's wake-up descriptor is read by a small thread here, which fails the round, so that backward returns.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client import Client

__all__ = ["Interrupts"]


class Interrupts:
    """Watches for SIGINT as long as a session is open. Does nothing off the main thread, or where a descriptor is set already."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._thread: threading.Thread | None = None
        if threading.current_thread() is not threading.main_thread():
            return
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        previous = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if previous != -1:
            signal.set_wakeup_fd(previous)
            os.close(self._read)
            os.close(self._write)
            return
        self._thread = threading.Thread(target=self._watch, name="ps-accordion-interrupts", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while number := os.read(self._read, 1):
            # Who has set a handler of their own wants to decide what Ctrl-C means.
            if number[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._client.fail(KeyboardInterrupt())

    def close(self) -> None:
        """Stop watching. Closing twice is harmless."""
        if self._thread is None:
            return
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)  # Python allows it nowhere else; elsewhere the descriptor just dies
        os.close(self._write)
        self._thread.join()
        os.close(self._read)
        self._thread = None
