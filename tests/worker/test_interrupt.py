"""What SIGTERM does to a worker, to its children, and to a script that has a handler of its own."""

import multiprocessing
import os
import queue
import signal
import threading
from types import SimpleNamespace

import pytest

from ps_accordion.worker.interrupt import Interrupts


@pytest.fixture
def killed(monkeypatch):
    """Return what this process is killed with, which it survives here."""
    kill, signals = os.kill, queue.SimpleQueue()
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.put(number) if pid == os.getpid() else kill(pid, number))
    return signals


@pytest.fixture
def interrupts(killed):
    """Watch as a session does that may leave."""
    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    watching = Interrupts(SimpleNamespace(fail=lambda error: None), lambda: True)
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    yield watching
    watching.close()
    signal.signal(signal.SIGTERM, before)


def test_the_second_sigterm_kills(interrupts, killed):
    """The main thread may never come to look."""
    signal.raise_signal(signal.SIGTERM)
    assert interrupts.asked
    signal.raise_signal(signal.SIGTERM)
    assert killed.get(timeout=20) == signal.SIGKILL


def test_a_handler_that_the_script_sets_later_decides_alone(interrupts, killed):
    """Also the second time."""
    seen = []
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    for _ in range(2):
        signal.raise_signal(signal.SIGTERM)
    interrupts.close()
    assert (seen, killed.qsize(), interrupts.asked) == ([signal.SIGTERM] * 2, 0, False)


def test_nobody_to_read_what_it_says_is_no_error(interrupts, monkeypatch):
    """It would come out of any line of the script: `train.py 2>&1 | tee log`, and tee was killed first."""

    def broken(descriptor, data):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", broken)
    signal.raise_signal(signal.SIGTERM)
    assert interrupts.asked


def test_forked_children_end_with_sigterm_and_their_parent_goes_on(interrupts, killed):
    """`Process.terminate` and pools end them so, and nobody has asked the parent for anything."""
    fork = multiprocessing.get_context("fork")
    up = fork.Semaphore(0)
    children = [fork.Process(target=_sleep, args=(up,)) for _ in range(2)]
    for child in children:
        child.start()
    try:
        for _ in children:
            assert up.acquire(timeout=20)
        for child in children:
            child.terminate()
            child.join(20)
        assert [child.exitcode for child in children] == [-signal.SIGTERM] * 2
    finally:
        for child in children:
            child.kill()
    interrupts.close()
    assert (killed.qsize(), interrupts.asked) == (0, False)


def _sleep(up):
    up.release()
    threading.Event().wait(60)
