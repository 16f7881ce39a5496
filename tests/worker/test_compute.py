"""Codec threads: one key's work stays in order, and no error is lost."""

import threading
import weakref

import numpy as np
import pytest

from ps_accordion.worker.compute import CodecThreads

PATIENCE = 10.0


def nothing() -> None:
    """Stands for whom nobody waits."""


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_work_of_a_key_is_done_in_order_on_one_thread(count: int) -> None:
    """However many keys and threads there are: that is why a residual needs no lock."""
    done: dict[int, list[tuple[int, str]]] = {key: [] for key in range(7)}
    threads = CodecThreads(count, pytest.fail, nothing)
    for number in range(100):
        for key in done:
            threads.submit(key, lambda key=key, number=number: done[key].append((number, threading.current_thread().name)))
    threads.close()
    for entries in done.values():
        assert [number for number, _ in entries] == list(range(100))
        assert len({name for _, name in entries}) == 1
    assert len({entries[0][1] for entries in done.values()}) == count


def test_keys_of_different_threads_do_not_wait_for_each_other() -> None:
    """A slow key holds up its own thread only."""
    threads = CodecThreads(2, pytest.fail, nothing)
    gate, passed = threading.Event(), threading.Event()
    threads.submit(0, lambda: gate.wait(PATIENCE))
    threads.submit(1, passed.set)
    assert passed.wait(PATIENCE)
    gate.set()
    threads.close()


def test_an_error_is_handed_on_and_the_thread_lives() -> None:
    """Also one that is no Exception; what is queued behind it is still done."""
    errors: list[BaseException] = []
    done = threading.Event()
    threads = CodecThreads(1, errors.append, nothing)

    def fail(error: BaseException) -> None:
        raise error

    threads.submit(0, lambda: fail(ValueError("one")))
    threads.submit(0, lambda: fail(KeyboardInterrupt()))
    threads.submit(0, done.set)
    threads.close()
    assert [type(error) for error in errors] == [ValueError, KeyboardInterrupt]
    assert done.is_set()


def test_close_finishes_what_is_queued_and_is_harmless_twice() -> None:
    """Nothing that was handed over is dropped; what comes afterwards is not waited for."""
    done: list[int] = []
    threads = CodecThreads(2, pytest.fail, nothing)
    for number in range(1000):
        threads.submit(number, lambda number=number: done.append(number))
    threads.close()
    threads.close()
    assert sorted(done) == list(range(1000))
    threads.submit(0, lambda: done.append(-1))
    threads.close()
    assert -1 not in done


def test_what_tasks_hand_on_is_said_now_and_then_and_before_a_thread_waits() -> None:
    """Not after every task, and never later than the last one that is queued."""
    said: list[int] = []
    done: list[int] = []
    gate, idle = threading.Event(), threading.Event()

    def say() -> None:
        said.append(len(done))
        if len(done) == 10:
            idle.set()

    threads = CodecThreads(1, pytest.fail, say)
    threads.submit(0, lambda: done.append(gate.wait(PATIENCE)))
    for _ in range(9):
        threads.submit(0, lambda: done.append(0))
    gate.set()
    assert idle.wait(PATIENCE)
    assert said == [1, 3, 7, 10]
    threads.close()


def test_an_idle_thread_keeps_no_gradient() -> None:
    """A task holds views of a model's memory: once it is done they are gone, though no other task follows."""
    threads = CodecThreads(1, pytest.fail, nothing)
    gradient = np.zeros(10)
    gone = threading.Event()
    weakref.finalize(gradient, gone.set)
    threads.submit(0, lambda held=gradient: None)
    del gradient
    assert gone.wait(PATIENCE)
    threads.close()
