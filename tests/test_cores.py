"""Codec threads: how many, and that no two of them have to share a core."""

import os
import threading

import pytest

from ps_accordion.cores import MOST_THREADS, codec_threads, keep_apart, usable_cores
from ps_accordion.worker.compute import CodecThreads


@pytest.mark.parametrize(("cores", "expected"), [(0, 1), (1, 1), (MOST_THREADS, MOST_THREADS), (64, MOST_THREADS)])
def test_the_number_of_threads_is_bounded_by_the_cores(cores, expected):
    """At least one, also for the ninth worker of eight cores."""
    assert codec_threads(cores) == expected


def kept(count, own=None):
    """Return the cores that each of `count` threads may use after `keep_apart`, of the cores `own` of all of them."""
    cores = [set()] * count

    def work(index):
        if own is not None:
            os.sched_setaffinity(0, own)
        keep_apart(index, count)
        cores[index] = os.sched_getaffinity(0)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return cores


def test_threads_that_are_kept_apart_share_no_core_and_leave_none_out():
    """And the rest of the process may still use all."""
    before = os.sched_getaffinity(0)
    cores = kept(usable_cores())
    assert sum(map(len, cores)) == len(set().union(*cores)) == usable_cores()
    assert os.sched_getaffinity(0) == before


def test_where_it_is_forbidden_threads_go_where_they_like(monkeypatch):
    """A sandbox may say no to any change."""

    def forbid(*_):
        raise PermissionError

    monkeypatch.setattr("os.sched_setaffinity", forbid)
    assert kept(usable_cores()) == [os.sched_getaffinity(0)] * usable_cores()


def test_more_threads_than_cores_share_them_all():
    """As they would without being told: also where the process itself was kept to one core."""
    first = {min(os.sched_getaffinity(0))}
    assert kept(2, own=first) == [first, first]


def test_codec_threads_are_kept_apart():
    """Each says where it may run."""
    count, cores, errors = usable_cores(), {}, []
    threads = CodecThreads(count, errors.append, lambda: None)
    for key in range(count):
        threads.submit(key, lambda key=key: cores.update({key: os.sched_getaffinity(0)}))
    threads.drain()
    threads.close()
    assert not errors
    assert sum(map(len, cores.values())) == len(set().union(*cores.values())) == count
