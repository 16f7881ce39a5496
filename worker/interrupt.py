"""What signals mean to a worker: Ctrl-C ends it, also while backward waits for the network; SIGTERM asks it to leave.

Python delivers a signal only between two of its own instructions, and a backward that waits runs none.
The signal's wake-up descriptor is read by a small thread here, which fails the round, so that backward returns.

A cluster that wants a machine back, or somebody who takes a worker away, sends SIGTERM: the worker finishes its step, hands over
what it has not sent, and ends with 0 (`leaving.py`). A second one, or one when there is no step to finish, kills it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client import Client

__all__ = ["Interrupts"]


ASKED = b"ps-accordion: SIGTERM: this worker leaves the run when its step is done; a second one kills it\n"


class Interrupts:
    """Watches for signals as long as a session is open. Does nothing off the main thread, or where a descriptor is set already.

    A handler of the script's own decides what its signal means.

    Args:
        client: Fails when Ctrl-C comes.
        may_leave: Whether there will be a step after which this worker can leave.

    Attributes:
        asked: Whether this worker was asked to leave.
    """

    def __init__(self, client: Client, may_leave: Callable[[], bool]) -> None:
        self._client = client
        self._may_leave = may_leave
        self._terms = 0
        self._handles = False
        self.asked = False
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
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_sigterm)
            self._handles = True
        _WATCHING.add(self)
        self._thread = threading.Thread(target=self._watch, name="ps-accordion-interrupts", daemon=True)
        self._thread.start()

    def _on_sigterm(self, number: int, _: FrameType | None) -> None:
        if not self._may_leave():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.asked = True
        with contextlib.suppress(OSError):  # whoever reads it may be gone: no reason to fail in the middle of a step
            os.write(2, ASKED)  # print may be what was interrupted

    def _watch(self) -> None:
        while number := os.read(self._read, 1):
            # Who has set a handler of their own, also after us, wants to decide what it means.
            if number[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._client.fail(KeyboardInterrupt())
            if number[0] == signal.SIGTERM and self._ours:
                self._terms += 1
                if self._terms > 1:  # the main thread may never come to look
                    os.kill(os.getpid(), signal.SIGKILL)

    @property
    def _ours(self) -> bool:
        """Whether SIGTERM still means what it does here."""
        return self._handles and signal.getsignal(signal.SIGTERM) == self._on_sigterm

    def forked(self) -> None:
        """In a child of this process: let SIGTERM end it, and keep its signals out of the pipe that it shares with its parent."""
        if self._thread is None:
            return
        if self._ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)

    def close(self) -> None:
        """Stop watching. Closing twice is harmless."""
        if self._thread is None:
            return
        if threading.current_thread() is threading.main_thread():
            if self._ours:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)  # Python allows it nowhere else; elsewhere the descriptor just dies
        os.close(self._write)
        self._thread.join()
        os.close(self._read)
        self._thread = None


_WATCHING: weakref.WeakSet[Interrupts] = weakref.WeakSet()


def _in_child() -> None:
    for interrupts in list(_WATCHING):
        interrupts.forked()


os.register_at_fork(after_in_child=_in_child)
