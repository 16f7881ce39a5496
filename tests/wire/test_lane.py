"""A lane: what is lent can be read while it stands, by whoever may and nobody else; no process is harmed by another's end."""

import contextlib
import fcntl
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import xxhash

from ps_accordion.errors import WireError
from ps_accordion.wire import lane as lanes
from ps_accordion.wire.lane import OtherLane, OwnLane, Span

HERE = os.getpid()


@contextlib.contextmanager
def made():
    # No fixture: pytest holds what those return until after descriptors are counted.
    lane = OwnLane()
    try:
        yield lane
    finally:
        lane.close()


def filled(lane: OwnLane, nbytes: int, value: int) -> np.ndarray:
    block = lane.take(nbytes)
    block[:] = value
    return block


def opened(lane: OwnLane) -> OtherLane:
    return OtherLane(HERE, lane.descriptor, lane.identity)


def lend(lane: OwnLane, block: np.ndarray):
    """Return where a block lies, and its digest."""
    span = lane.span_of(block)
    return [span], lane.digest_of([span], [block])


def bytes_of(loan) -> list[bytes]:
    return [bytes(frame) for frame in loan.frames]


def test_what_is_lent_is_read_where_it_lies():
    """The same bytes without a copy: what the owner writes later is seen, and nobody else can write."""
    with made() as own:
        block, other = filled(own, 100_000, 7), opened(own)
        loan = other.loan(*lend(own, block))
        assert loan.verified()
        assert bytes_of(loan) == [bytes([7]) * 100_000]
        block[5] = 9
        assert loan.frames[0][5] == 9
        assert loan.frames[0].readonly
        with pytest.raises(WireError, match="of what lies in the lane"):
            loan.verified()
        assert block.ctypes.data % 64 == 0


def test_only_bytes_that_begin_with_a_block_have_a_place():
    """Other memory has none, nor has the middle of a block, or one that was given back."""
    with made() as own:
        block = own.take(1000)
        assert own.span_of(block[:10]).nbytes == 10
        assert own.span_of(block[1:]) is None
        assert own.span_of(np.zeros(1000, np.uint8)) is None
        assert own.span_of(bytes(1000)) is None


def test_memory_is_taken_again_when_the_last_view_of_it_is_gone():
    """Not before, whatever kind of view it is; and then a loan of what was there no longer stands."""
    with made() as own:
        block = filled(own, 5000, 1)
        view, (spans, digest) = block[10:20].data, lend(own, block)
        other = opened(own)
        loan = other.loan(spans, digest)
        del block
        second = filled(own, 5000, 2)
        assert loan.stands
        assert bytes(view) == bytes([1]) * 10
        view.release()
        del view
        third = filled(own, 5000, 3)
        assert own.span_of(third).offset == spans[0].offset != own.span_of(second).offset
        assert not loan.stands
        assert not loan.verified()
        assert not other.loan(spans, digest).stands


def test_a_digest_that_was_computed_before_is_that_of_the_block():
    """It goes with the block, not with the place."""
    with made() as own:
        block = filled(own, 5000, 1)
        spans, digest = lend(own, block)
        own.seal(block.data)
        assert lend(own, block) == (spans, digest)
        assert own.digest_of([own.span_of(block[:10])], [block[:10]]) == xxhash.xxh3_64_intdigest(bytes([1]) * 10)
        own.seal(np.zeros(10, np.uint8).data)
        del block
        again = filled(own, 5000, 2)
        assert own.span_of(again).offset == spans[0].offset
        assert lend(own, again)[1] == xxhash.xxh3_64_intdigest(bytes([2]) * 5000)


def test_a_lane_that_is_used_again_and_again_does_not_grow():
    """As many blocks as were held at a time, two a thread, of each length."""
    with made() as own:

        def work(value: int) -> None:
            for length in (5000, 70_000):
                for _ in range(200):
                    block = filled(own, length, value)
                    assert (block == value).all()

        threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert own._end <= mmap.PAGESIZE + 2 * 4 * (2 * mmap.PAGESIZE + 18 * mmap.PAGESIZE)


def test_a_full_lane_says_so(monkeypatch):
    """There is no memory of it left: the caller takes other."""
    with made() as own:
        monkeypatch.setattr(lanes, "SIZE", own._end + 3 * mmap.PAGESIZE)
        block = own.take(2 * mmap.PAGESIZE)
        assert block is not None
        assert own.take(2 * mmap.PAGESIZE) is None


def test_no_size_of_a_lane_can_be_changed():
    """So a read of it cannot fail, whatever its owner does."""
    with made() as own:
        for size in (mmap.PAGESIZE, 2 * lanes.SIZE):
            with pytest.raises(PermissionError):
                os.ftruncate(own.descriptor, size)


@pytest.mark.parametrize(
    "span",
    [
        Span(0, 10, 1),
        Span(64, 10, 1),
        Span(mmap.PAGESIZE, 10, 1),
        Span(mmap.PAGESIZE + 65, 10, 1),
        Span(mmap.PAGESIZE + 64, lanes.SIZE, 1),
        Span(lanes.SIZE + 64, 10, 1),
        Span((1 << 63) - 1, 10, 1),
    ],
)
def test_a_place_outside_of_the_blocks_is_refused(span):
    """Nothing is read there."""
    with made() as own, pytest.raises(WireError, match="a place inside a lane"):
        opened(own).loan([span], 0)


def test_what_is_no_lane_is_refused(tmp_path):
    """A process or descriptor that is not there, a file, a pipe, memory of others or unsealed, and another lane than was said."""
    with made() as own:
        with pytest.raises(FileNotFoundError):
            OtherLane(2**22 + 5, 3, 1)
        with pytest.raises(FileNotFoundError):
            OtherLane(HERE, 999_999, 1)
        with pytest.raises(WireError, match="are processes numbered as there"):
            OtherLane(HERE, own.descriptor, own.identity + 1)
        reading, writing = os.pipe()
        foreign = os.memfd_create("other", os.MFD_ALLOW_SEALING)
        loose = os.memfd_create("ps-accordion-lane", os.MFD_ALLOW_SEALING)
        os.ftruncate(loose, mmap.PAGESIZE)
        with (tmp_path / "memfd:ps-accordion-lane").open("w") as file:
            for descriptor in (reading, foreign, file.fileno(), loose):
                with pytest.raises(WireError, match=r"expected a (sealed )?lane"):
                    OtherLane(HERE, descriptor, own.identity)
        fcntl.fcntl(loose, fcntl.F_ADD_SEALS, lanes._SEALS)
        with pytest.raises(WireError, match="found another"):
            OtherLane(HERE, loose, own.identity)
        for descriptor in (reading, writing, foreign, loose):
            os.close(descriptor)


CHILD = """
import os, sys
from ps_accordion.wire.lane import OwnLane
lane = OwnLane()
block = lane.take(100_000)
block[:] = 5
span = lane.span_of(block)
print(os.getpid(), lane.descriptor, lane.identity, *span, lane.digest_of([span], [block]), flush=True)
sys.stdin.read()
"""


def test_what_a_dead_process_has_lent_stays_readable():
    """It was killed: nothing of it is left but what is read, and no other process can open it any more."""
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        process, descriptor, identity, *span, digest = map(int, child.stdout.readline().split())
        other = OtherLane(process, descriptor, identity)
        child.send_signal(signal.SIGKILL)
    loan = other.loan([Span(*span)], digest)
    del other
    gc.collect()
    assert loan.verified()
    assert bytes_of(loan) == [bytes([5]) * 100_000]
    with pytest.raises(FileNotFoundError):
        OtherLane(process, descriptor, identity)
