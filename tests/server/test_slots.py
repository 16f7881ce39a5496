"""A record of two slots: whatever part of a write has reached the memory, a reader finds the old record or the new one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_accordion.errors import StorageError
from ps_accordion.server.durable.slots import MAX_PARTS, Damaged, Slots

CAPACITY = 500
BLOCK = 64
OLD, NEW = (b"old header", b"", b"o" * 300), (b"new header, longer", b"n" * 400)


def fresh():
    memory = memoryview(bytearray(Slots.nbytes(CAPACITY)))
    return memory, Slots.format(memory)


def written(*records):
    memory, slots = fresh()
    for parts in records:
        slots.write(*parts)
    return memory


def found(memory):
    return tuple(Slots(memory).read() or ())


def half_of(memory, before):
    """Return the half of the memory that the last write changed."""
    half = len(memory) // 2
    changed = [place for place in range(2) if memory[place * half :][:half] != before[place * half :][:half]]
    assert len(changed) == 1
    return range(changed[0] * half, (changed[0] + 1) * half)


def test_what_was_never_written_reads_as_nothing() -> None:
    """Which is not the same as a record without parts."""
    memory, slots = fresh()
    assert slots.read() is None
    assert Slots(memory).read() is None
    slots.write()
    assert slots.read() == []
    assert Slots(memory).read() == []


@given(st.lists(st.lists(st.binary(max_size=CAPACITY // MAX_PARTS), max_size=MAX_PARTS), min_size=1, max_size=5))
def test_the_last_record_is_read(records) -> None:
    """By the writer, and by whoever comes after it; empty parts stay parts."""
    memory, slots = fresh()
    for parts in records:
        slots.write(*parts)
        assert slots.read() == parts
        assert Slots(memory).read() == parts


def test_a_reader_goes_on_where_the_writer_was() -> None:
    """It overwrites the older slot, not the one that it has just read."""
    memory = written(OLD, NEW)
    before = bytes(memory)
    Slots(memory).write(b"third")
    half = half_of(memory, before)
    memory[half.start : half.stop] = bytes(len(half))
    assert found(memory) == NEW


@pytest.mark.parametrize("block", range(Slots.nbytes(CAPACITY) // 2 // BLOCK))
def test_every_block_of_the_newer_slot_counts(block: int) -> None:
    """A flipped bit in any byte that the write has used gives the older record; behind that it changes nothing."""
    before = written(OLD)
    memory = written(OLD, NEW)
    used = 128 + sum(map(len, NEW))
    start = half_of(memory, before).start + block * BLOCK
    for place in range(start, start + BLOCK):
        memory[place] ^= 0x10
        assert found(memory) == (OLD if place - start + block * BLOCK < used else NEW)
        memory[place] ^= 0x10
    assert found(memory) == NEW


@given(st.data())
def test_a_write_that_is_there_in_part_is_there_in_whole_or_not_at_all(data) -> None:
    """Any set of bytes of the write may be there, not only those of a beginning."""
    before, after = written(OLD), written(OLD, NEW)
    half = half_of(after, before)
    size = data.draw(st.sampled_from([1, 8, BLOCK]))
    there = data.draw(st.integers(0, (1 << len(half) // size) - 1))
    mixed = memoryview(bytearray(before))
    for number in range(len(half) // size):
        if there >> number & 1:
            place = half.start + number * size
            mixed[place : place + size] = after[place : place + size]
    assert found(mixed) == (NEW if bytes(mixed) == bytes(after) else OLD)


def test_every_beginning_of_a_write_gives_the_old_record() -> None:
    """Parts first, then what describes them, the checksum last: a process may be killed behind any byte of these."""
    before, after = written(OLD), written(OLD, NEW)
    half = half_of(after, before)
    end = half.start + 128 + sum(map(len, NEW))
    order = [*range(half.start + 128, end), *range(half.start + 8, half.start + 128), *range(half.start, half.start + 8)]
    mixed = memoryview(bytearray(before))
    for place in order:
        assert found(mixed) == OLD
        mixed[place] = after[place]
    assert found(mixed) == NEW


def test_two_damaged_slots_are_no_record() -> None:
    """And never an empty one."""
    memory = written(OLD, NEW)
    for start in (0, len(memory) // 2):
        memory[start + 130] ^= 1
    with pytest.raises(Damaged, match="both copies"):
        Slots(memory)
    with pytest.raises(Damaged, match="both copies"):
        Slots(memoryview(bytearray(Slots.nbytes(CAPACITY))))


@pytest.mark.parametrize("parts", [[bytes(CAPACITY + 100)], [b""] * (MAX_PARTS + 1)])
def test_a_record_that_is_too_large_is_refused(parts) -> None:
    """What was there stays."""
    memory, slots = fresh()
    slots.write(*OLD)
    with pytest.raises(StorageError, match=r"got (1 parts and 600|19 parts and 0) bytes"):
        slots.write(*parts)
    assert tuple(slots.read() or ()) == found(memory) == OLD


def test_a_closed_record_is_not_written() -> None:
    """As with a closed file."""
    memory, slots = fresh()
    slots.write(*OLD)
    slots.close()
    slots.close()
    for use in (slots.read, lambda: slots.write(b"more")):
        with pytest.raises(ValueError, match="released"):
            use()
    assert found(memory) == OLD
