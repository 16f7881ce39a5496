import numpy as np
import pytest
import twins

from ps_accordion.codecs import effective, get, lightest, names, suite
from ps_accordion.errors import CodecError


def test_names_are_the_wire_names_and_get_finds_each():
    """What stands in a header finds the codec that wrote the payload."""
    assert (
        ", ".join(names())
        == "bf16, dense, dgc, eden, int, natural, onebit, powersgd, qsgd, quic_fl, random_block, random_k, signsgd, terngrad, "
        "threshold, topk"
    )
    assert [get(name).name for name in names()] == names()


def test_an_unknown_codec_is_refused_with_the_legal_names_and_the_nearest():
    """The message is enough to correct the configuration."""
    with pytest.raises(
        CodecError,
        match=r"among bf16, dense, dgc, eden, int, .*, terngrad, threshold, topk, got 'topkk'; did you mean 'topk'\?",
    ):
        get("topkk")
    with pytest.raises(CodecError, match=r"among bf16, dense, .*, threshold, topk, got 'zzz'$"):
        effective("zzz", 0.1, 10)


def test_an_unknown_option_is_refused_with_the_legal_ones():
    """An option of another codec is as unknown as a misspelt one."""
    with pytest.raises(CodecError, match=r"codec topk: expected options among values, got 'value'; did you mean 'values'\?"):
        get("topk", value="fp32")
    with pytest.raises(CodecError, match=r"codec dense: expected options among \(none\), got 'values'"):
        get("dense", values="fp32")
    with pytest.raises(CodecError, match=r"expected codec options among bucket, cap, coverage, momentum, values, got 'level'"):
        suite(level=1)
    with pytest.raises(CodecError, match=r"expected values to be 'fp32', 'fp16', 'int8' or 'packed', got 'fp8'"):
        suite(values="fp8")


def test_a_suite_hands_each_codec_the_options_it_has():
    """One call makes all codecs of a job."""
    codecs = suite(values="fp32")
    assert sorted(codecs) == names()
    assert codecs["topk"] == get("topk", values="fp32")


def test_where_compression_is_no_smaller_than_dense_dense_is_sent():
    """The price counts indices, scales and counts; the twin computes it anew."""
    assert effective("topk", 0.01, 262_144) == ("topk", 0.01)
    assert effective("topk", 0.5, 262_144) == ("dense", 16)
    assert effective("topk", 0.01, 2) == ("dense", 16)
    assert effective("random_block", 0.5, 1000) == ("random_block", 0.5)
    assert effective("random_block", 0.51, 1000) == ("dense", 16)
    assert effective("dense", 32, 1000) == ("dense", 32)
    assert effective("topk", 0.6, 1000, dense_level=32) == ("topk", 0.6)
    assert effective("topk", 0.4, 262_144, codecs=suite(values="fp32")) == ("dense", 16)
    rng = np.random.default_rng(0)
    for _ in range(300):
        choice = (["topk", "random_block"][rng.integers(2)], float(rng.random()) or 1.0, int(rng.integers(1, 300_000)))
        assert effective(*choice) == twins.effective(*choice)


def test_an_illegal_level_is_refused_before_anything_is_priced():
    """A plan with a level of zero is a mistake, not a very small payload."""
    with pytest.raises(CodecError, match="expected a level in"):
        effective("topk", 0.0, 1000)


def test_the_lightest_choice_has_the_largest_payload_in_any_order():
    """Ties go to the first name and the larger level, so rank order plays no part."""
    choices = [("topk", 0.01), ("topk", 0.04), ("random_block", 0.02), ("dense", 16)]
    assert lightest(choices[:2], 100_000) == ("topk", 0.04)
    assert lightest(choices, 100_000) == lightest(choices[::-1], 100_000) == ("dense", 16)
    tied = [("random_block", 1.0), ("dense", 32)]
    assert lightest(tied, 100) == lightest(tied[::-1], 100) == ("dense", 32)
    thresholds = [("threshold", 0.01), ("threshold", 0.05)]
    assert lightest(thresholds, 100) == lightest(thresholds[::-1], 100) == ("threshold", 0.01)
    near = [("topk", 0.0101), ("topk", 0.0102)]
    assert lightest(near, 100) == lightest(near[::-1], 100) == ("topk", 0.0102)
