"""From a tensor table to keys and shards: complete, within limits, balanced, and the same everywhere."""

import itertools
import re

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_accordion import layout as module
from ps_accordion.capacity import models
from ps_accordion.config import LARGEST_KEY
from ps_accordion.errors import LayoutError
from ps_accordion.layout import DENSE_BELOW, FUSE_ELEMENTS, MATRIX_ELEMENTS, MAX_FUSED, Layout, Tensor, read_table

PARTITION = 1 << 18
SMALL_SHAPES = st.one_of(
    st.just(()), st.tuples(st.integers(1, 3 * FUSE_ELEMENTS)), st.tuples(st.integers(1, 31), st.integers(1, 32))
)
LARGE_SHAPES = st.one_of(
    st.tuples(st.integers(32, 700), st.integers(32, 900)), st.tuples(*[st.integers(1, 9)] * 2, *[st.integers(1, 40)] * 2)
)
ROWS = st.one_of(
    st.tuples(SMALL_SHAPES | LARGE_SHAPES, st.sampled_from(module.KINDS), st.just(False)),
    st.tuples(SMALL_SHAPES | LARGE_SHAPES, st.just("float32"), st.just(True)),
)
TABLES = st.lists(ROWS, min_size=1, max_size=60).map(lambda rows: [Tensor(f"t{index}", *row) for index, row in enumerate(rows)])
LAYOUTS = st.builds(
    lambda tensors, shards, partition: Layout(tensors, num_shards=shards, partition_elements=partition),
    TABLES,
    st.integers(1, 9),
    st.sampled_from([1024, 1 << 13, PARTITION]),
)


def table(*rows: tuple[int, ...]) -> list[Tensor]:
    """Name a row of shapes."""
    return [Tensor(f"t{index}", shape, "float32") for index, shape in enumerate(rows)]


MODELS = {"ResNet-50": (models.resnet50(), 25_557_032, 161), "BERT-base": (models.bert_base(), 109_482_240, 199)}


@pytest.mark.parametrize("model", MODELS)
def test_the_tables_of_models_are_theirs(model: str) -> None:
    """The published numbers of parameters and of tensors."""
    tensors, elements, count = MODELS[model]
    assert sum(tensor.elements for tensor in tensors) == elements
    assert len(tensors) == count


@given(LAYOUTS)
def test_every_element_of_every_tensor_is_in_exactly_one_slice(layout: Layout) -> None:
    """Nothing is lost, nothing is pushed twice."""
    covered = sorted((part.tensor, part.start, part.length) for key in layout.keys for part in key.slices)
    ends = dict.fromkeys(range(len(layout.tensors)), 0)
    for tensor, start, length in covered:
        assert start == ends[tensor]
        assert length > 0
        ends[tensor] += length
    assert ends == {index: tensor.elements for index, tensor in enumerate(layout.tensors)}


@given(LAYOUTS)
def test_slices_fill_their_key_without_gaps(layout: Layout) -> None:
    """A key's vector is its slices, end to end."""
    for key in layout.keys:
        offsets = [0, *itertools.accumulate(part.length for part in key.slices)]
        assert [part.offset for part in key.slices] == offsets[:-1]
        assert key.elements == offsets[-1]


@given(LAYOUTS)
def test_keys_stay_within_their_limits(layout: Layout) -> None:
    """A compressible key is a part of one tensor, as one of buffers is; a fused one has few slices: used bits fit a word."""
    for number, key in enumerate(layout.keys):
        assert key.number == number
        assert 0 <= key.shard < layout.num_shards
        assert all(layout.tensors[part.tensor].small == key.small for part in key.slices)
        assert all(layout.tensors[part.tensor].buffer == key.buffer for part in key.slices)
        if key.small and not key.buffer:
            assert len(key.slices) <= MAX_FUSED
            assert key.elements <= FUSE_ELEMENTS
        else:
            assert len(key.slices) == 1
            assert key.elements <= layout.partition_elements


@given(LAYOUTS)
def test_keys_come_in_the_order_in_which_backward_makes_gradients(layout: Layout) -> None:
    """Last registered first, by the first slice of each key."""
    assert [key.tensor for key in layout.keys] == sorted((key.tensor for key in layout.keys), reverse=True)


@given(LAYOUTS)
def test_a_table_that_was_sent_gives_the_same_layout(layout: Layout) -> None:
    """Server and coordinator compute what the worker computed, from its bytes."""
    twin = Layout(read_table(layout.table), num_shards=layout.num_shards, partition_elements=layout.partition_elements)
    assert twin.tensors == layout.tensors
    assert twin.keys == layout.keys
    assert twin.digest == layout.digest
    assert twin.difference(layout) == ""


@given(LAYOUTS)
def test_shards_own_all_keys_and_share_none(layout: Layout) -> None:
    """`keys_of_shard` is a partition of the keys."""
    owned = [key for shard in range(layout.num_shards) for key in layout.keys_of_shard(shard)]
    assert sorted(key.number for key in owned) == list(range(len(layout.keys)))


@given(LAYOUTS)
def test_no_shard_is_more_than_one_key_behind_another(layout: Layout) -> None:
    """Greedy assignment: taking the largest key from the fullest shard leaves it no fuller than any other."""
    for small in (False, True):
        loads = _loads(layout, small)
        fullest = loads.index(max(loads))
        smallest = min((key.elements for key in layout.keys_of_shard(fullest) if key.small is small), default=0)
        assert max(loads) - smallest <= min(loads)


def test_the_largest_key_of_each_kind_do_not_meet() -> None:
    """Compressible keys are dealt from shard 0 on, small ones from the other end."""
    layout = Layout(table((64, 64), (64,)), num_shards=3, partition_elements=PARTITION)
    assert [(key.small, key.shard) for key in layout.keys] == [(True, 2), (False, 0)]


@pytest.mark.parametrize(
    ("elements", "partition", "keys"),
    [
        (1 << 18, LARGEST_KEY, 1),
        ((1 << 18) + 1024, LARGEST_KEY, 2),
        (1 << 20, LARGEST_KEY, 4),
        (1 << 21, LARGEST_KEY, 8),
        (1 << 22, LARGEST_KEY, 8),
        (1 << 23, LARGEST_KEY, 8),
        (1 << 24, LARGEST_KEY, 16),
        (1 << 20, 1 << 16, 16),
        (1 << 22, 1 << 19, 8),
        (1 << 22, 1 << 18, 16),
    ],
)
@pytest.mark.parametrize("together", [False, True])
def test_a_small_model_has_keys_to_share(elements: int, partition: int, keys: int, together: bool) -> None:
    """Eight, but none below 262,144 elements for that; whatever it is made of, and never larger ones than are asked for."""
    tensors = table((1024, elements // 1024)) if together else table((256, elements // 1024), (768, elements // 1024))
    layout = Layout(
        [*tensors, Tensor("moving", (3 * partition,), "float32", buffer=True)], num_shards=2, partition_elements=partition
    )
    sizes = [key.elements for key in layout.keys if not key.buffer]
    assert sum(sizes) == elements // 1024 * 1024
    assert keys <= len(sizes) <= keys + len(tensors)
    assert max(sizes) <= max(partition if partition < 1 << 18 else 1 << 18, -(-elements // 8))
    assert [key.elements for key in layout.keys if key.buffer] == [partition] * 3


@pytest.mark.parametrize("shards", [2, 8])
@pytest.mark.parametrize("partition", [PARTITION, LARGEST_KEY])
@pytest.mark.parametrize("model", MODELS)
def test_real_models_are_balanced(model: str, partition: int, shards: int) -> None:
    """No shard carries more than 1.05 times the mean, of small keys and of compressible ones."""
    layout = Layout(MODELS[model][0], num_shards=shards, partition_elements=partition)
    for small in (False, True):
        loads = _loads(layout, small)
        assert max(loads) <= 1.05 * sum(loads) / len(loads)


def _loads(layout: Layout, small: bool) -> list[int]:
    return [sum(key.elements for key in layout.keys_of_shard(shard) if key.small is small) for shard in range(layout.num_shards)]


def test_a_small_model_is_not_cut_into_crumbs() -> None:
    """Balance is worth nothing below a message's own size: a few hundred small elements are one key."""
    layout = Layout(table((32, 1, 3, 3), (32,), (64,), (10,)), num_shards=8, partition_elements=PARTITION)
    assert len(layout.keys) == 1


@pytest.mark.parametrize(
    ("shape", "small"),
    [((), True), ((1 << 20,), True), ((31, 33), True), ((32, 32), False), ((1, DENSE_BELOW), False), ((5, 5, 5, 5), True)],
)
def test_only_vectors_and_tiny_tensors_go_dense(shape: tuple[int, ...], small: bool) -> None:
    """Everything with two dimensions and 1,024 elements is worth compressing."""
    layout = Layout(table(shape), num_shards=1, partition_elements=PARTITION)
    assert all(key.small is small for key in layout.keys)
    assert layout.compressible == (() if small else (0,))


def test_buffers_have_keys_of_their_own() -> None:
    """Cut like a compressible tensor but never compressed; fused neighbours go on in one key behind them."""
    rows = [*table((64, 32), (5,)), Tensor("moving", (PARTITION + 9,), "float32", buffer=True), Tensor("last", (7,), "float32")]
    layout = Layout(rows, num_shards=1, partition_elements=PARTITION)
    told = [(key.small, key.buffer, [(part.tensor, part.start, part.length) for part in key.slices]) for key in layout.keys]
    assert told == [
        (True, False, [(3, 0, 7), (1, 0, 5)]),
        (True, True, [(2, 0, PARTITION)]),
        (True, True, [(2, PARTITION, 9)]),
        (False, False, [(0, 0, 2048)]),
    ]
    assert layout.compressible == (0,)


def test_buffers_change_nothing_about_how_other_tensors_are_cut() -> None:
    """They do not count among the small elements that a fused key takes its share of."""
    rows = table((300, 40), (9000,), (64, 32), (500,))
    plain = Layout(rows, num_shards=3, partition_elements=PARTITION)
    more = Layout([*rows, Tensor("moving", (70_000,), "float32", buffer=True)], num_shards=3, partition_elements=PARTITION)
    assert [key.slices for key in more.keys if not key.buffer] == [key.slices for key in plain.keys]


def test_used_bits_name_slices() -> None:
    """Bit i of a push says that slice i had a gradient."""
    (key,) = Layout(table((3,), (4,), (5,)), num_shards=1, partition_elements=PARTITION).keys
    assert key.all_used == 0b111
    assert key.elements_of(key.all_used) == []
    assert key.elements_of(0b101) == [key.slices[1]]


BASE = [Tensor("a", (64, 32), "float32"), Tensor("b", (7,), "float32")]


@pytest.mark.parametrize(
    ("tensors", "shards", "partition", "said"),
    [
        ([BASE[0]._replace(name="A"), BASE[1]], 2, PARTITION, "tensor 0 is 'a' .* there and 'A' .* here"),
        ([BASE[0]._replace(shape=(32, 64)), BASE[1]], 2, PARTITION, r"\(64, 32\) .*\(32, 64\)"),
        ([BASE[0], BASE[1]._replace(dtype="float64")], 2, PARTITION, "tensor 1 .*float32 .*float64"),
        ([BASE[0], BASE[1]._replace(buffer=True)], 2, PARTITION, r"float32 there .* float32 \(buffers\) here"),
        (BASE[::-1], 2, PARTITION, "tensor 0"),
        (BASE[:1], 2, PARTITION, "2 tensors there and 1 here"),
        ([*BASE, Tensor("c", (1,), "float32")], 2, PARTITION, "2 tensors there and 3 here"),
        (BASE, 3, PARTITION, "digest"),
        (BASE, 2, 1024, "digest"),
    ],
)
def test_the_digest_changes_with_every_field_and_the_difference_is_told(
    tensors: list[Tensor], shards: int, partition: int, said: str
) -> None:
    """Two workers with different models are told apart at join, and told where."""
    base = Layout(BASE, num_shards=2, partition_elements=PARTITION)
    other = Layout(tensors, num_shards=shards, partition_elements=partition)
    assert base.digest != other.digest
    assert re.search(said, base.difference(other))


def test_the_digest_is_part_of_the_protocol() -> None:
    """Computed once; a change means that two versions cannot join one run."""
    layout = Layout(BASE, num_shards=2, partition_elements=PARTITION)
    assert layout.table == msgpack.packb([["a", [64, 32], "float32", False], ["b", [7], "float32", False]])
    assert layout.digest == PINNED


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([], "at least one"),
        ([BASE[0], BASE[0]], "'a' stands twice"),
        ([Tensor("x" * 513, (1,), "float32")], "longer than 512"),
        ([Tensor("é" * 257, (1,), "float32")], "longer than 512"),
        ([Tensor("\udc80", (1,), "float32")], "not Unicode"),
        ([Tensor("a", (1,), "int64")], "expected one of float32"),
        ([Tensor("a", (8,), "float16", buffer=True)], r"'a' \(8,\) float16 \(buffers\): buffers travel as float32"),
        ([Tensor("a", (8,), "int64", buffer=True)], "buffers travel as float32"),
        ([Tensor("a", (0,), "float32")], "expected 1 to"),
        ([Tensor("a", (-4, -4), "float32")], "expected 1 to"),
        ([Tensor("a", (1 << 21, 1 << 20), "float32")], "expected 1 to"),
        ([Tensor("a", (1,) * 65, "float32")], "65 dimensions"),
        ([Tensor("a", (1 << 20, 1 << 20), "float32")], "4194304 keys .*raise layout.partition_elements"),
        ([Tensor("a", (1 << 40,), "float32")], "33554432 keys"),
        ([Tensor("a", (1 << 40,), "float32", buffer=True)], "4194304 keys"),
    ],
)
def test_an_impossible_table_is_refused(tensors: list[Tensor], said: str) -> None:
    """Before anything is cut, and with the tensor named."""
    with pytest.raises(LayoutError, match=said):
        Layout(tensors, num_shards=1, partition_elements=PARTITION)


@pytest.mark.parametrize(("shards", "partition"), [(0, 1024), (-1, 1024), (1, 0)])
def test_an_impossible_split_is_refused(shards: int, partition: int) -> None:
    """The two numbers come from a message, too."""
    with pytest.raises(LayoutError, match="at least 1 shard and 1 element"):
        Layout(BASE, num_shards=shards, partition_elements=partition)


HOSTILE = {
    "nothing": b"",
    "no msgpack": b"\xc1",
    "a number": msgpack.packb(7),
    "a map": msgpack.packb({"a": 1}),
    "a string of three letters": msgpack.packb(["abc"]),
    "a row too short": msgpack.packb([["a", [1]]]),
    "a row without the last field": msgpack.packb([["a", [1], "float32"]]),
    "a row too long": msgpack.packb([["a", [1], "float32", False, 0]]),
    "a number instead of true": msgpack.packb([["a", [1], "float32", 1]]),
    "nil instead of false": msgpack.packb([["a", [1], "float32", None]]),
    "buffers of halves": msgpack.packb([["a", [1], "float16", True]]),
    "a number as name": msgpack.packb([[1, [1], "float32", False]]),
    "bytes as name": msgpack.packb([[b"a", [1], "float32", False]]),
    "a size that is true": msgpack.packb([["a", [True], "float32", False]]),
    "a size that is a fraction": msgpack.packb([["a", [1.0], "float32", False]]),
    "a size below zero": msgpack.packb([["a", [-1, -1], "float32", False]]),
    "a size of nil": msgpack.packb([["a", [None], "float32", False]]),
    "a shape that is a number": msgpack.packb([["a", 3, "float32", False]]),
    "a name too long": msgpack.packb([["a" * 513, [1], "float32", False]]),
    "a name that is not UTF-8": b"\x91\x94\xa1\xff\x91\x01\xa7float32\xc2",
    "bytes after the end": msgpack.packb([["a", [1], "float32", False]]) + b"\0",
    "an extension": b"\x91\x94" + msgpack.packb(msgpack.ExtType(1, b"x")) + b"\x91\x01\xa7float32\xc2",
    "an array that claims to be long": b"\xdd\xff\xff\xff\xff",
    "nesting": b"\x91" * 5000,
    "a shape of a hundred thousand sizes": msgpack.packb([["a", [(1 << 63) - 1] * 100_000, "float32", False]]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_table_is_refused(kind: str) -> None:
    """Whatever a peer sends as a table ends as a `LayoutError`, soon."""
    with pytest.raises(LayoutError):
        Layout(read_table(HOSTILE[kind]), num_shards=1, partition_elements=PARTITION)


def test_a_table_of_too_many_bytes_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit comes before the parser."""
    monkeypatch.setattr(module, "MAX_TABLE_BYTES", 10)
    with pytest.raises(LayoutError, match="at most 10 bytes, this one has 15"):
        read_table(msgpack.packb([["a", [1], "float32", False]]))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_a_layout_error(data: bytes) -> None:
    """No other exception escapes the parser."""
    try:
        layout = Layout(read_table(data), num_shards=2, partition_elements=PARTITION)
    except LayoutError:
        return
    assert layout.tensors


PINNED = "bfd29f6d23cb863f"


def test_matrices_are_keys_as_whole_as_can_be() -> None:
    """Cut between rows, in keys of about one size; small tensors and buffers as ever."""
    rows = [*table((64, 32), (4096, 4096), (9,)), Tensor("moving", (5000,), "float32", buffer=True)]
    layout = Layout(rows, num_shards=2, partition_elements=PARTITION, matrices=lambda _: True)
    told = [(key.rows, [(part.tensor, part.start, part.length) for part in key.slices]) for key in layout.keys]
    half = 2048 * 4096
    assert half == MATRIX_ELEMENTS
    assert told == [
        (0, [(3, 0, 5000)]),
        (0, [(2, 0, 9)]),
        (2048, [(1, 0, half)]),
        (2048, [(1, half, half)]),
        (64, [(0, 0, 2048)]),
    ]
    plain = Layout(rows, num_shards=2, partition_elements=PARTITION)
    assert plain.digest != layout.digest
    assert all(key.rows == 0 for key in plain.keys)


def test_only_those_tensors_are_matrices_that_are_said_to_be() -> None:
    """By their names; the others are cut into partitions as ever, and the digest tells which is which."""
    rows = table((64, 96), (96, 64), (64,))
    layouts = [
        Layout(rows, num_shards=1, partition_elements=4096, matrices=names.__contains__)
        for names in ((), ("t0",), ("t1",), ("t0", "t1"), ("t0", "t2"))
    ]
    cuts = [[(key.rows, key.tensor, key.elements) for key in layout.keys if not key.small] for layout in layouts]
    parts = {index: [(0, index, 4096), (0, index, 2048)] for index in (0, 1)}
    whole = {0: [(64, 0, 6144)], 1: [(96, 1, 6144)]}
    assert cuts[:4] == [parts[1] + parts[0], parts[1] + whole[0], whole[1] + parts[0], whole[1] + whole[0]]
    assert len({layout.digest for layout in layouts}) == 4
    assert (cuts[4], layouts[4].digest) == (cuts[1], layouts[1].digest)  # a small tensor is none, whatever is said of it


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((64, 128, 3, 3), 64), ((12, 64, 768), 768), ((1, 1, 64, 64), 64), ((1, 2048), 1), ((3, 40, 40), 120), ((5000, 3000), 2500)],
)
def test_a_tensor_is_the_matrix_with_the_fewest_rows_and_columns(shape: tuple[int, ...], rows: int) -> None:
    """Convolutions by their outputs, stacks by what is inside; what is too large has half the rows."""
    layout = Layout(table(shape), num_shards=1, partition_elements=PARTITION, matrices=lambda _: True)
    assert {key.rows for key in layout.keys} == {rows}


def test_rows_that_are_too_long_for_a_key_are_cut_like_any_tensor() -> None:
    """A matrix of two endless rows is none."""
    layout = Layout(table((2, MATRIX_ELEMENTS + 1)), num_shards=1, partition_elements=1 << 19, matrices=lambda _: True)
    assert {key.rows for key in layout.keys} == {0}
    assert max(key.elements for key in layout.keys) == 1 << 19
