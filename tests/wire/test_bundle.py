"""Bundles: several messages as one, and the same messages again on the other side, whatever is small or large among them."""

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_accordion.errors import WireError
from ps_accordion.wire import framing
from ps_accordion.wire import messages as m
from ps_accordion.wire.bundle import ALIGNMENT, MOST_BYTES, MOST_HEADER, bundled, parts_of


def push(key: int, *lengths: int) -> tuple[m.Push, list[bytes]]:
    message = m.Push(0, key, 12, 1, 2, "DATA", 1.0, 1, False, "topk", 0.04, 100, 4, 0, list(lengths))
    return message, [bytes([key % 256]) * length for length in lengths]


def opened(frames: list) -> list:
    """Return the messages in some frames, their payload as bytes."""
    return [(message, [bytes(frame) for frame in payload]) for message, payload in parts_of(*framing.unpack(frames))]


@given(st.lists(st.lists(st.integers(0, 40), max_size=17), max_size=100))
def test_what_is_bundled_comes_out_as_it_was(lengths: list[list[int]]) -> None:
    """The same messages in the same order with the same frames, empty ones too, each aligned for kernels."""
    parts = [push(key, *some[:16]) for key, some in enumerate(lengths)]
    messages = list(bundled(parts))
    assert [each for frames in messages for each in opened(frames)] == parts
    assert len(messages) == -(-len(parts) // m.MAX_BUNDLED)
    for frames in messages:
        for _, payload in parts_of(*framing.unpack([np.frombuffer(bytearray(frame), np.uint8).data for frame in frames])):
            starts = [np.frombuffer(frame, np.uint8).ctypes.data for frame in payload if len(frame)]
            assert all(start % ALIGNMENT == 0 for start in starts) or len(parts) == 1


def test_one_message_goes_as_it_always_did() -> None:
    """The bytes of a single message are those of `framing.pack`, and its payload is not copied."""
    payload = np.arange(100, dtype=np.uint8)
    message = push(3, 100)[0]
    (frames,) = bundled([(message, [payload.data])])
    assert frames == framing.pack(message, [payload.data])
    assert np.shares_memory(np.frombuffer(frames[1], np.uint8), payload)


def test_what_is_large_waits_for_nothing_and_lets_nothing_wait() -> None:
    """A bundle is complete before it is read, so it stays small: a whole partition travels alone, in its place."""
    parts = [push(0, 10), push(1, 20), push(2, 1 << 20), push(3, 30), push(4, MOST_BYTES - 32), push(5, 1)]
    messages = list(bundled(parts))
    assert [len(parts_of(*framing.unpack(frames))) for frames in messages] == [2, 1, 2, 1]
    assert [each for frames in messages for each in opened(frames)] == parts


def test_long_headers_are_bundled_up_to_a_limit() -> None:
    """So that no bundle has a header that nobody takes."""
    parts = [(m.Refuse(0, key, 0, "x" * m.MAX_TEXT), []) for key in range(50)]
    messages = list(bundled(parts))
    assert [each for frames in messages for each in opened(frames)] == parts
    assert max(len(frames[0]) for frames in messages) < MOST_HEADER + 1024
    assert len(messages) == 4


PULSE = ["pulse"]
HOSTILE = {
    "another bundle in it": ([[["bundle", [[PULSE, []]]], []]], b"", "got another bundle"),
    "what is no message": ([[["surprise"], []]], b"", "not a message"),
    "no message": ([[[], []]], b"", "not a message"),
    "too few bytes": ([[PULSE, [8, 3]]], b"12345678ab", "expected 11 bytes .* got 10"),
    "too many bytes": ([[PULSE, [1]], [PULSE, [1]]], b"1.......2.", "expected 9 bytes .* got 10"),
    "bytes for nobody": ([[PULSE, []]], b"1", "expected 0 bytes .* got 1"),
    "a negative length": ([[PULSE, [-1]]], b"", "not a message"),
    "a length of 4 GiB": ([[PULSE, [(1 << 32) - 1]]], b"1", "expected 4294967295 bytes"),
    "18 frames": ([[PULSE, [0] * 18]], b"", "not a message"),
    "65 messages": ([[PULSE, []]] * 65, b"", "not a message"),
    "a message without lengths": ([[PULSE]], b"", "not a message"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_bundle_that_is_none_is_refused(what: str) -> None:
    """With a WireError, though its checksum is right: nothing of it is taken for a message."""
    parts, joined, expected = HOSTILE[what]
    body = msgpack.packb(["bundle", parts])
    frames = [body, joined] if joined else [body]
    checksum = framing.xxhash.xxh3_64(b"".join(frames)).intdigest().to_bytes(8, "little")
    header = b"PSA" + bytes([framing.PROTOCOL_VERSION]) + checksum + body
    with pytest.raises(WireError, match=expected):
        parts_of(*framing.unpack([header, *frames[1:]]))


def test_a_bundle_with_two_frames_is_refused() -> None:
    """All payload is in one."""
    (frames,) = bundled([push(0, 4), push(1, 4)])
    bundle, _ = framing.unpack(frames)
    with pytest.raises(WireError, match="at most one frame behind the header of a bundle, got 2"):
        parts_of(*framing.unpack(framing.pack(bundle, [b"0000", b"1111"])))
