"""What threads have taken of the processor, by their kind."""

import threading
import time

from ps_accordion.worker.processor import server_seconds, worker_seconds


def test_the_time_of_a_codec_thread_is_its_own():
    """As much as the thread itself has counted, and nothing of threads of other names."""
    counted, looked = threading.Event(), threading.Event()

    def work() -> None:
        while time.thread_time() < 0.06:  # the kernel brings a running thread's account up to date at its next tick
            pass
        counted.set()
        looked.wait()

    for name, kinds in (("ps-accordion-codec-7", {"worker codec"}), ("ps-accordion-io", {"worker sockets"}), ("other", set())):
        counted.clear()
        looked.clear()
        thread = threading.Thread(target=work, name=name)
        thread.start()
        counted.wait()
        taken = worker_seconds()
        looked.set()
        thread.join()
        # Threads of ZeroMQ are there where another test of this process has used it.
        assert set(taken) - {"worker zeromq"} == kinds, name
        assert all(taken[kind] >= 0.02 for kind in kinds), name


def test_servers_that_others_have_started_are_not_counted():
    """There are none beside this test's process."""
    assert server_seconds() == {}
