"""Rates, times, models and coefficients: as people and benches write them, and what is said where they do not."""

import pytest

from ps_accordion.capacity import MODELS, bits_per_second, bits_text, of_parameters, read_table, seconds, works_of
from ps_accordion.errors import ConfigError
from ps_accordion.layout import Tensor
from ps_accordion.regimes.base import Choice


@pytest.mark.parametrize(
    ("text", "expected", "shown"),
    [
        ("10Gbit", 1e10, "10 Gbit/s"),
        ("100 Mbit/s", 1e8, "100 Mbit/s"),
        ("2.5gbit", 2.5e9, "2.5 Gbit/s"),
        ("56kbit", 5.6e4, "56 kbit/s"),
    ],
)
def test_rates(text, expected, shown):
    """In bits, as networks are sold."""
    assert bits_per_second(text, source="--bandwidth") == pytest.approx(expected)
    assert bits_text(expected) == shown


@pytest.mark.parametrize("text", ["10", "fast", "10Gbyte", "-1Gbit", "0Gbit", "", "1e9bit", "10 GB/s"])
def test_what_is_no_rate_is_refused(text):
    """What came is quoted, and where from."""
    with pytest.raises(ConfigError, match=r"--bandwidth: expected a rate such as 10Gbit.*got"):
        bits_per_second(text, source="--bandwidth")


def test_bytes_are_told_from_bits():
    """The mistake that everybody makes once."""
    with pytest.raises(ConfigError, match="bits, not bytes"):
        bits_per_second("1GB/s", source="--bandwidth")


@pytest.mark.parametrize(("text", "expected"), [("20ms", 0.02), ("1.5 s", 1.5), ("150us", 1.5e-4), ("0", 0.0), ("2min", 120.0)])
def test_times(text, expected):
    """With a unit, but for nothing."""
    assert seconds(text, source="--compute") == pytest.approx(expected)


@pytest.mark.parametrize("text", ["20", "soon", "-1ms", "", "20ms/s", "1h"])
def test_what_is_no_time_is_refused(text):
    """What came is quoted, and where from."""
    with pytest.raises(ConfigError, match=r"--compute: expected a time such as 20ms.*got"):
        seconds(text, source="--compute")


@pytest.mark.parametrize("count", [1024, 25_557_032, 2048 * 2048, 110_000_000])
def test_a_model_of_which_only_the_size_is_known_has_that_size(count):
    """All of its elements, most of them in matrices."""
    tensors = of_parameters(count)
    assert sum(tensor.elements for tensor in tensors) == count
    assert sum(tensor.elements for tensor in tensors if tensor.small) <= 2048


def test_a_table_is_read_from_a_file(tmp_path):
    """Names and shapes, as named_parameters() has them."""
    file = tmp_path / "model.json"
    file.write_text('[["fc.weight", [10, 128]], ["fc.bias", [10]]]')
    assert read_table(file) == [Tensor("fc.weight", (10, 128), "float32"), Tensor("fc.bias", (10,), "float32")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, f"expected {', '.join(MODELS)}, or a file"),
        ("{", "is no JSON"),
        ("[]", "expected a JSON list"),
        ('[["a", [1]], ["b", ["2"]]]', 'row 1 is ."b"'),
        ('[["a", [0]]]', "row 0"),
        ('[["a"]]', "row 0"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, text, said):
    """With the form that is expected."""
    file = tmp_path / "model.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_table(file)


def rows(codec="topk", level=0.01, **ms):
    """Write rows of `bench codecs` of a million elements, of which a copy takes 1 ms."""
    return [{"codec": codec, "op": op, "level": level, "n": 10**6, "ms": time, "vs_memcpy": time} for op, time in ms.items()]


def test_rows_of_bench_codecs_become_seconds_an_element():
    """Encoding with feedback, decoding, a whole round at a server, and what a member adds to it."""
    works, copy = works_of(rows(encode_feedback=2, decode=0.5, fold2=2, fold4=3, fold8=5, answer8=8), source="file")
    work = works[Choice("topk", 0.01)]
    assert work == pytest.approx((2e-9, 0.5e-9, 8e-9, 0.5e-9))
    assert copy == pytest.approx(1e-9)
    assert work.answered(2) == pytest.approx(5e-9)
    assert work.answered(108) == pytest.approx(58e-9)


def test_linear_codecs_are_summed_undecoded_and_whole_tensors_take_turns():
    """A round of theirs is no fold."""
    works, _ = works_of(
        rows("powersgd", 4.0, encode_feedback=2, encode_turned=4, decode=1, linear_sum8=0.8, fold2=9, fold8=9, answer8=9),
        source="file",
    )
    work = works[Choice("powersgd", 4.0)]
    assert work == pytest.approx((3e-9, 1e-9, 0.8e-9, 0.1e-9))
    assert work.answered(2) == pytest.approx(0.2e-9)


def test_rows_that_lack_something_are_refused():
    """And rows of other benches passed over."""
    assert works_of([{"case": "dense:32", "ms": 1}], source="file") == ({}, 0.0)
    with pytest.raises(ConfigError, match=r"file: topk:0\.01 has no row 'answer8'"):
        works_of(rows(encode_feedback=1, decode=1, fold2=1, fold8=1), source="file")
    with pytest.raises(ConfigError, match="file: expected rows as bench codecs"):
        works_of([{"op": "decode", "ms": "much"}], source="file")
