"""Every message survives the wire unchanged, and nothing else gets through."""

import math
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_accordion.wire import framing
from ps_accordion.wire import messages as m

KINDS = [
    kind
    for kind in map(m.__dict__.get, m.__all__)
    if isinstance(kind, type) and issubclass(kind, m.Message) and kind is not m.Message
]
LARGEST = (1 << 63) - 1
TEXT = st.characters(exclude_categories=["Cs"])  # everything but surrogates, which have no place in UTF-8


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for one field, by its type and the limits that its annotation sets."""
    if get_origin(hint) is Annotated:
        plain, meta = get_args(hint)
        return _limited(plain, meta)
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.tuples(*map(values_of, get_args(hint)))
    if get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        return st.one_of(*map(values_of, get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, m.Message):
        return of_kind(hint)
    return {
        bool: st.booleans(),
        int: st.integers(-LARGEST, LARGEST),
        float: st.floats(allow_nan=False),
    }[hint]


def _limited(plain: Any, meta: msgspec.Meta) -> st.SearchStrategy[Any]:
    low, high = meta.min_length or 0, min(meta.max_length or 0, 20)
    if plain is str and meta.pattern:
        return st.from_regex(meta.pattern, fullmatch=True).filter(lambda text: len(text) <= meta.max_length)
    if plain is str:
        return st.text(TEXT, min_size=low, max_size=max(low, high))
    if get_origin(plain) is list:
        return st.lists(values_of(get_args(plain)[0]), min_size=low, max_size=high)
    if get_origin(plain) is dict:
        return st.dictionaries(*map(values_of, get_args(plain)), max_size=high)
    if plain is float:
        return st.floats(meta.ge, meta.le)
    return st.integers(meta.ge, LARGEST if meta.lt is None and meta.le is None else meta.le or meta.lt - 1)


def of_kind(kind: type[m.Message]) -> st.SearchStrategy[m.Message]:
    hints = get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{field: values_of(hints[field]) for field in kind.__struct_fields__})


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not m.Bundle], ids=lambda kind: kind.__name__)
@given(st.data())
def test_a_message_comes_out_as_it_went_in(kind: type[m.Message], data: st.DataObject) -> None:
    """Each field of each message keeps value and type, at its limits too."""
    message = data.draw(of_kind(kind))
    got, payload = framing.unpack(framing.pack(message))
    assert (got, type(got), payload) == (message, kind, [])


def test_every_message_is_listed_once_under_a_tag_of_its_own() -> None:
    """What is not in `__all__` cannot be unpacked, and two messages with one tag could not be told apart."""
    defined = {kind for kind in m.Message.__subclasses__() if kind.__module__.startswith(m.__name__)}
    assert defined == set(KINDS)
    assert len({kind.__struct_config__.tag for kind in KINDS}) == len(KINDS)


def test_a_rate_or_loss_that_is_not_known_travels_as_not_a_number() -> None:
    """A worker that tracks no optimizer still reports its norms."""
    report, _ = framing.unpack(framing.pack(m.Report(0, 1, 0, 0, 9, math.nan, math.nan)))
    assert isinstance(report, m.Report)
    assert math.isnan(report.rate)
    assert math.isnan(report.loss)


def test_reasons_travel_in_any_language() -> None:
    """The limit of a reason counts characters, not bytes: an error in Chinese is as long as one in English."""
    reason = "梯度不是有限的数。" * (m.MAX_TEXT // 9)
    assert framing.unpack(framing.pack(m.Leave(0, 1, reason, 1)))[0] == m.Leave(0, 1, reason, 1)


def test_headers_of_a_round_stay_under_512_bytes() -> None:
    """With every field at its largest; a usual one takes a tenth of that."""
    word, seed, name = (1 << 32) - 1, (1 << 64) - 1, "n" * 64
    coding = (name, 1e-300, word, word, seed, [word] * 16)
    push = m.Push(word, word, (1 << 48) - 1, (1 << 16) - 1, word, "JOINED", 1e9, word, True, *coding)
    result = m.Result(word, word, (1 << 48) - 1, word, "UNUSED", word, (1 << 16) - 1, *coding, word)
    assert [framing.unpack(framing.pack(each))[0] for each in (push, result)] == [push, result]
    assert max(len(framing.pack(each)[0]) for each in (push, result)) < 512
    usual = m.Push(0, 45, 1234, 1, 2, "DATA", 1.0, 1, False, "topk", 0.04, 262_144, 10_486, 0, [41_964])
    assert len(framing.pack(usual)[0]) < 80


def test_a_full_view_fits_a_header() -> None:
    """A thousand members and as many shards can be named at once."""
    members = [(slot, slot + 1) for slot in range(1024)]
    shards = [(number, (1 << 63) - 1, f"{number:x<256}") for number in range(1024)]
    view = m.View(1, members, [(0, 1000, 1)], shards, [], 0, [])
    assert framing.unpack(framing.pack(view))[0] == view
