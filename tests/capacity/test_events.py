"""Cores, threads and links take the time that one can work out by hand."""

import math

import pytest

from ps_accordion.capacity.events import Clock, Cores, Host, Thread, send


class Log(list):
    """What happened, and when."""

    def __init__(self, clock):
        super().__init__()
        self._clock = clock

    def note(self, name):
        self.append((name, pytest.approx(self._clock.now)))


def test_threads_share_cores_equally():
    """Three seconds of work for three threads on two cores, one of them shorter: 1 at 2/3 of a core, then 2 with one each."""
    clock = Clock()
    log, cores = Log(clock), Cores(clock, 2)
    for name, work in (("short", 1.0), ("long", 2.0), ("longer", 3.0)):
        cores.run(work, log.note, name)
    clock.run()
    assert log == [("short", 1.5), ("long", 2.5), ("longer", 3.5)]
    assert cores.busy == 6.0


def test_a_core_a_thread_is_enough():
    """Without a number, nobody waits for a core."""
    clock = Clock()
    log, cores = Log(clock), Cores(clock, None)
    for work in (2.0, 1.0, 3.0):
        cores.run(work, log.note, work)
    clock.run()
    assert log == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]


def test_who_comes_later_slows_who_is_there():
    """One core: the first has half of its work done when a second comes, and both go on at half speed."""
    clock = Clock()
    log, cores = Log(clock), Cores(clock, 1)
    cores.run(2.0, log.note, "first")
    clock.at(1.0, cores.run, 0.5, log.note, "second")
    clock.run()
    assert log == [("second", 2.0), ("first", 2.5)]


def test_a_thread_does_one_thing_after_the_other():
    """In the order in which they were submitted, also while it works."""
    clock = Clock()
    log, thread = Log(clock), Thread(Cores(clock, None))
    thread.submit(1.0, lambda: thread.submit(1.0, log.note, "third"))
    thread.submit(2.0, log.note, "second")
    clock.run()
    assert log == [("second", 3.0), ("third", 4.0)]
    assert thread.busy == 4.0


def test_a_message_leaves_and_comes_in_at_once():
    """10 bytes at 5 a second take 2 s, not 4; a slower end decides; a delay comes on top."""
    for up, down, delay, expected in ((5.0, 5.0, 0.0, 2.0), (5.0, 2.0, 0.0, 5.0), (2.0, 5.0, 0.0, 5.0), (5.0, 5.0, 0.25, 2.5)):
        clock = Clock()
        log, cores = Log(clock), Cores(clock, None)
        source = Host(clock, cores, rate=up, delay=delay)
        target = Host(clock, cores, rate=down, delay=delay)
        send(source, target, 10.0, 10.0, log.note, "there")
        clock.run()
        assert log == [("there", expected)], (up, down, delay)


def test_two_senders_share_what_one_receiver_takes_in():
    """And one sender's second message waits for its first."""
    clock = Clock()
    log, cores = Log(clock), Cores(clock, None)
    hosts = [Host(clock, cores, rate=10.0) for _ in range(4)]
    send(hosts[0], hosts[2], 10.0, 10.0, log.note, "a")
    send(hosts[1], hosts[2], 10.0, 10.0, log.note, "b")
    send(hosts[0], hosts[3], 10.0, 10.0, log.note, "c")
    clock.run()
    assert log == [("a", 1.0), ("b", 2.0), ("c", 2.0)]
    assert (hosts[0].up.busy, hosts[2].down.busy) == (2.0, 2.0)


def test_nothing_passes_a_link_within_a_host():
    """Not even a slow one."""
    clock = Clock()
    log, host = Log(clock), Host(clock, Cores(clock, None), rate=1.0, delay=9.0)
    send(host, host, 10.0, 10.0, log.note, "there")
    clock.run()
    assert log == [("there", 0.0)]
    assert host.up.busy == 0.0
    assert Host(clock, host.cores).up.rate == math.inf
