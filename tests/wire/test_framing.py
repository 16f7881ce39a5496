"""Frames: what is damaged or hostile is refused, quickly, with nothing but a WireError."""

import random
import time
import tracemalloc

import msgpack
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ps_accordion.errors import WireError
from ps_accordion.wire import framing
from ps_accordion.wire import messages as m

PUSH = m.Push(0, 3, 12, 1, 2, "DATA", 1.0, 1, False, "topk", 0.04, 100, 4, 0, [7])
FIELDS = ["push", 0, 3, 12, 1, 2, "DATA", 1.0, 1, False, "topk", 0.04, 100, 4, 0, [7]]


def framed(body: bytes, version: int = framing.PROTOCOL_VERSION) -> list[bytes]:
    """Return a header frame whose checksum is right, whatever `body` is."""
    return [b"PSA" + bytes([version]) + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little") + body]


def flipped(frames: list[bytes], frame: int, bit: int) -> list[bytes]:
    changed = bytearray(frames[frame])
    changed[bit // 8] ^= 1 << bit % 8
    return [*frames[:frame], bytes(changed), *frames[frame + 1 :]]


def test_the_fields_above_are_a_push() -> None:
    """The damage below is done to a body that is good without it."""
    assert framing.unpack(framed(msgpack.packb(FIELDS)))[0] == PUSH


def test_every_flipped_bit_of_a_short_message_is_refused() -> None:
    """In the magic, the version, the checksum, the header and the payload."""
    frames = [bytes(frame) for frame in framing.pack(PUSH, [b"payload"])]
    assert framing.unpack(frames)[0] == PUSH
    for number, frame in enumerate(frames):
        for bit in range(8 * len(frame)):
            with pytest.raises(WireError):
                framing.unpack(flipped(frames, number, bit))


def test_flipped_bits_of_a_long_message_are_refused() -> None:
    """A sample of the bits of a whole partition in several frames."""
    draw = random.Random(7)
    frames = [bytes(frame) for frame in framing.pack(PUSH, [draw.randbytes(100_000), draw.randbytes(1), draw.randbytes(60_000)])]
    for _ in range(300):
        number = draw.randrange(len(frames))
        with pytest.raises(WireError):
            framing.unpack(flipped(frames, number, draw.randrange(8 * len(frames[number]))))


def test_lost_swapped_and_shifted_frames_are_refused() -> None:
    """The checksum covers which frame comes after which; their lengths stand in the header."""
    frames = framing.pack(PUSH, [b"one", b"other"])
    for damaged in (
        [],
        frames[:1],
        frames[:2],
        frames[1:],
        [frames[0], frames[2], frames[1]],
        [*frames, b"more"],
        frames[:1] * 19,
    ):
        with pytest.raises(WireError):
            framing.unpack(damaged)
    _, payload = framing.unpack([frames[0], b"oneo", b"ther"])  # the same bytes, cut elsewhere
    with pytest.raises(WireError, match=r"of \[3, 5\] bytes, got \[4, 4\]"):
        framing.join_frames(payload, [3, 5])


def test_another_protocol_version_says_both() -> None:
    """Who runs an older release reads which one is older."""
    with pytest.raises(WireError, match=r"protocol version 9 from there, 2 here; install the same release"):
        framing.unpack(framed(msgpack.packb(FIELDS), version=9))


def test_another_version_is_told_before_anything_is_read() -> None:
    """A later release may frame its messages differently: neither its checksum nor its body matter."""
    with pytest.raises(WireError, match="protocol version 3 from there"):
        framing.unpack([b"PSA\x03" + bytes(30)])


def with_field(index: int, value: object) -> bytes:
    return msgpack.packb([*FIELDS[:index], value, *FIELDS[index + 1 :]])


HOSTILE = {
    "nothing": b"",
    "a number": b"\x05",
    "a map": b"\x81\xa3tag\xa5ended",
    "no tag": b"\x90",
    "an unknown tag": msgpack.packb(["surprise", 1]),
    "a tag that is a number": msgpack.packb([7, 1]),
    "a tag that is the base class": msgpack.packb(["Message"]),
    "a field too many": msgpack.packb([*FIELDS, 0, 0]),
    "a field too few": msgpack.packb(FIELDS[:9]),
    "bytes after the end": msgpack.packb(FIELDS) + b"\x00",
    "two messages": msgpack.packb(["ended"]) * 2,
    "half a message": msgpack.packb(FIELDS)[:-3],
    "a negative key": with_field(2, -1),
    "a key beyond 32 bits": with_field(2, 1 << 32),
    "a round of -2": with_field(3, -2),
    "a slot that is text": with_field(4, "1"),
    "a slot that is a float": with_field(4, 1.0),
    "a slot that is true": with_field(4, True),
    "a slot that is nothing": with_field(4, None),
    "another kind": with_field(6, "END"),
    "a weight that is not a number": with_field(7, float("nan")),
    "an infinite weight": with_field(7, float("inf")),
    "a negative weight": with_field(7, -1.0),
    "a flag that is 1": with_field(9, 1),
    "a codec that is bytes": with_field(10, b"topk"),
    "a long codec": with_field(10, "x" * 65),
    "a negative seed": with_field(14, -1),
    "17 frames": with_field(15, [1] * 17),
    "a frame of negative length": with_field(15, [-1]),
    "frames in a map": with_field(15, {0: 1}),
    "text that is not UTF-8": b"\x92\xa3bye\xa3\xed\xb3\xbf",
    "text of 4 GiB that is not there": b"\x92\xa3bye\xdb\xff\xff\xff\xff",
    "bytes of 4 GiB that are not there": b"\x92\xa3bye\xc6\xff\xff\xff\xff",
    "an extension": b"\x92\xa3bye\xc9\xff\xff\xff\xff\x05",
    "a time": b"\x92\xa3bye\xd6\xff\x00\x00\x00\x00",
    "an array of 4 Gi": b"\xdd\xff\xff\xff\xff",
    "a list of 4 Gi": b"\x99\xa4view\x01\xdd\xff\xff\xff\xff",
    "a long list that is not there": b"\x99\xa4view\x01\xdc\x0f\xff",
    "a map of 4 Gi": b"\x94\xa4join\xa1x\x00\xdf\xff\xff\xff\xff",
    "arrays in arrays": b"\x91" * 60_000,
    "maps in maps": b"\x81" * 60_000,
    "large arrays in large arrays": b"\xdd\x00\x01\x00\x00" * 12_000,
    "arrays in arrays, in a field that is too many": b"\x92\xa5ended" + b"\xdd\x00\x01\x00\x00" * 12_000,
    "terms with a list": msgpack.packb(["join", "t", 0, {"a": [1]}]),
    "terms with a number as their name": msgpack.packb(["join", "t", 0, {1: 1}]),
    "129 terms": msgpack.packb(["join", "t", 0, {str(number): 0 for number in range(129)}]),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused(body: bytes) -> None:
    """With a WireError, in milliseconds and without memory, though its checksum is right."""
    frames = framed(body)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(WireError):
        framing.unpack(frames)
    seconds = time.process_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 19
    assert seconds < 0.25


@given(st.binary(max_size=200))
def test_random_bytes_are_a_message_or_a_wire_error(body: bytes) -> None:
    """Nothing else comes out of a header, whatever is in it."""
    try:
        message, _ = framing.unpack(framed(body))
    except WireError:
        return
    assert isinstance(message, m.Message)


ITEMS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
TAGS = st.sampled_from([kind.__struct_config__.tag for kind in m.Message.__subclasses__()])


@given(TAGS, st.lists(ITEMS, max_size=16))
def test_random_fields_are_a_message_or_a_wire_error(tag: str, fields: list[object]) -> None:
    """A good tag before anything that msgpack can say."""
    try:
        message, _ = framing.unpack(framed(msgpack.packb([tag, *fields])))
    except WireError:
        return
    assert isinstance(message, m.Message)


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_random_frames_are_refused(frames: list[bytes]) -> None:
    """A stranger that connects sees an error, and nobody crashes."""
    with pytest.raises(WireError):
        framing.unpack(frames)


def test_headers_and_frames_beyond_their_limits_are_refused() -> None:
    """Before the checksum of a large header is even looked at, and for a payload frame larger than any partition."""
    with pytest.raises(WireError, match="header frame"):
        framing.unpack([b"PSA\x02" + bytes(framing.MAX_HEADER)])
    with pytest.raises(WireError, match=f"at most {framing.MAX_FRAME} bytes, got {framing.MAX_FRAME + 1}"):
        framing.unpack(framing.pack(m.Ended(), [bytes(framing.MAX_FRAME + 1)]))
    assert framing.unpack(framing.pack(m.Ended(), [bytes(framing.MAX_FRAME)]))[0] == m.Ended()


def test_a_payload_is_not_copied_on_its_way_out() -> None:
    """The frames that leave are the buffers that came, so that a megabyte is only read for its checksum."""
    payload = np.arange(100, dtype=np.uint8)
    frames = framing.pack(PUSH, [payload.data, b"x"])
    assert np.shares_memory(np.frombuffer(frames[1], np.uint8), payload)
    assert framing.unpack(frames)[1] == [payload.data, b"x"]


@pytest.mark.parametrize("offset", range(5))
@pytest.mark.parametrize("writable", [True, False])
def test_joined_frames_are_aligned_and_writable(offset: int, writable: bool) -> None:
    """However the frame lies in memory: kernels read its bytes as 4-byte numbers. A good frame is not copied."""
    memory = np.arange(64, dtype=np.uint8)
    assert memory.ctypes.data % 4 == 0
    memory.flags.writeable = writable
    frame = memory[offset : offset + 40].data
    joined = framing.join_frames([frame], [40])
    assert joined.tolist() == list(range(offset, offset + 40))
    assert joined.ctypes.data % 4 == 0
    assert joined.flags.writeable
    assert np.shares_memory(joined, memory) == (writable and offset % 4 == 0)


def test_several_frames_become_one_array() -> None:
    """In order, also when one of them is empty; no frames are an empty array."""
    assert framing.join_frames([b"ab", b"", b"cde"], [2, 0, 3]).tobytes() == b"abcde"
    assert framing.join_frames([], []).size == 0
    assert framing.join_frames([b""], [0]).size == 0


@pytest.mark.parametrize("lengths", [[], [2], [2, 3, 0], [3, 2], [5], [2, 4]])
def test_frames_of_other_lengths_than_the_header_says_are_refused(lengths: list[int]) -> None:
    """Both are named."""
    with pytest.raises(WireError, match=r"got \[2, 3\]"):
        framing.join_frames([b"ab", b"cde"], lengths)
