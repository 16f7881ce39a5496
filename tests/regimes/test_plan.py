"""Plans on the wire."""

import math

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_accordion.errors import WireError
from ps_accordion.regimes import Choice, Plan, decode_plan, encode_plan, plan_bound
from ps_accordion.regimes.plan import MAX_PALETTE

LEVELS = st.floats(1e-9, 1e9)
CHOICES = st.lists(
    st.builds(Choice, st.sampled_from(["topk", "dense", "random_block"]), LEVELS), min_size=1, max_size=MAX_PALETTE
)


@st.composite
def plans(draw):
    """Draw plans within every limit."""
    palette = draw(CHOICES)
    tensors = draw(st.integers(1, 70))
    return Plan(
        version=draw(st.integers(0, 2**63 - 1)),
        choices=tuple(draw(st.lists(st.sampled_from(palette), min_size=tensors, max_size=tensors))),
        critical=tuple(draw(st.lists(st.booleans(), min_size=tensors, max_size=tensors))),
        expires_round=draw(st.integers(0, 2**63 - 1)),
        batch_multiplier=draw(st.integers(1, 4096)),
        period=draw(st.integers(1, 1 << 20)),
        reason=draw(st.text(max_size=60)),
    )


def fields(**changes):
    """Return the nine fields of a good plan for ten tensors, some of them changed by position (f0 to f8)."""
    row = [1, 7, 500, 1, 1, "why", [["topk", 0.5], ["topk", 0.25]], bytes([0, 1] * 5), bytes([0xFF, 0x03])]
    for name, value in changes.items():
        row[int(name[1:])] = value
    return row


@given(plans())
def test_a_plan_comes_back_equal_and_within_its_bound(plan):
    """decode(encode(plan)) == plan, in at most plan_bound bytes."""
    data = encode_plan(plan)
    assert plan == decode_plan(data, len(plan.choices))
    assert len(data) <= plan_bound(len(plan.choices))


def test_a_large_plan_takes_a_little_more_than_a_byte_a_tensor():
    """Ten thousand tensors at two levels fit in 11.4 kB."""
    plan = Plan(1, (Choice("topk", 0.04), Choice("topk", 0.005)) * 5000, (True, False) * 5000, 10)
    assert len(encode_plan(plan)) < 11_400


@given(st.binary(max_size=400), st.integers(1, 40))
def test_random_bytes_are_refused(data, tensors):
    """Whatever arrives, the answer is a plan or a WireError."""
    try:
        plan = decode_plan(data, tensors)
    except WireError:
        return
    assert encode_plan(plan)


@given(plans(), st.data())
def test_damaged_plans_are_refused_or_are_plans(plan, data):
    """One changed, missing or added byte never gives anything but a legal plan or a WireError."""
    encoded = bytearray(encode_plan(plan))
    position = data.draw(st.integers(0, len(encoded) - 1))
    kind = data.draw(st.sampled_from(["change", "cut", "grow"]))
    if kind == "change":
        encoded[position] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del encoded[position:]
    else:
        encoded.append(data.draw(st.integers(0, 255)))
    try:
        back = decode_plan(bytes(encoded), len(plan.choices))
    except WireError:
        return
    assert kind == "change"
    assert decode_plan(encode_plan(back), len(plan.choices)) == back


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=5), st.binary(max_size=12)
)


@given(
    st.dictionaries(st.sampled_from([f"f{i}" for i in range(9)]), st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), min_size=1)
)
def test_fields_of_the_wrong_kind_are_refused(changes):
    """Well-formed msgpack with anything in any field is a plan or a WireError."""
    try:
        plan = decode_plan(msgpack.packb(fields(**changes)), 10)
    except WireError:
        return
    assert len(plan.choices) == len(plan.critical) == 10


def test_the_fields_used_below_make_a_good_plan():
    """The refusals below are for the change that each names, and for nothing else."""
    assert decode_plan(msgpack.packb(fields()), 10).version == 7


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"f0": 2}, "format"),
        ({"f0": True}, "format"),
        ({"f1": -1}, "version"),
        ({"f1": True}, "version"),
        ({"f1": 2**63}, "version"),
        ({"f2": 1.5}, "expires_round"),
        ({"f3": 0}, "at least 1"),
        ({"f4": 0}, "at least 1"),
        ({"f5": "x" * 257}, "not a plan"),
        ({"f5": b"why"}, "reason"),
        ({"f6": []}, "palette"),
        ({"f6": [["topk", 0.5]]}, "palette"),
        ({"f6": [["topk", 0.5], ["topk", 0.5]]}, "differ"),
        ({"f6": [["topk", 0.5], ["topk", 1]]}, "float level"),
        ({"f6": [["topk", 0.5], ["topk", math.nan]]}, "finite"),
        ({"f6": [["topk", 0.5], ["topk", math.inf]]}, "finite"),
        ({"f6": [["topk", 0.5], ["topk", 0.0]]}, "above 0"),
        ({"f6": [["topk", 0.5], ["", 0.25]]}, "codec"),
        ({"f6": [["topk", 0.5], ["x" * 65, 0.25]]}, "codec"),
        ({"f6": [["topk", 0.5]] + [["topk", 2.0 + i] for i in range(16)]}, "not a plan"),
        ({"f7": bytes([0, 2] * 5)}, "palette"),
        ({"f7": bytes(10)}, "palette"),
        ({"f7": bytes([0, 1] * 4)}, "10 bytes"),
        ({"f8": bytes([0xFF, 0x07])}, "spare bits"),
        ({"f8": bytes(3)}, "2 bytes"),
    ],
)
def test_each_limit_is_checked(changes, said):
    """Every field out of its range is refused with its name."""
    with pytest.raises(WireError, match=said):
        decode_plan(msgpack.packb(fields(**changes)), 10)


def test_hostile_shapes_are_refused():
    """Deep nesting, huge announced lengths, maps, extension types and other tops are refused at once."""
    hostile = (
        b"\x91" * 3000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x81\x01\x02",
        b"\xd6\xff\x00\x00\x00\x00",
        b"\xc1",
        b"",
        b"\x01",
    )
    for data in hostile:
        with pytest.raises(WireError):
            decode_plan(data, 5000)
    with pytest.raises(WireError, match="at most"):
        decode_plan(bytes(plan_bound(3) + 1), 3)


def test_a_plan_with_too_many_choices_is_not_sent():
    """A policy that makes more choices than a plan holds hears of it at the coordinator."""
    choices = tuple(Choice("topk", 1.0 + index) for index in range(MAX_PALETTE + 1))
    with pytest.raises(WireError, match="1 to 16 different choices, got 17"):
        encode_plan(Plan(1, choices, (True,) * len(choices), 10))
    with pytest.raises(WireError, match="as many regimes as choices"):
        encode_plan(Plan(1, choices[:2], (True,), 10))
