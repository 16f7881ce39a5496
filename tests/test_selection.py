"""Codecs by the name of a tensor: which row counts, what small tensors get, and what is said when a row is of no use."""

import pytest

from ps_accordion.compression import CodecSettings
from ps_accordion.config import Settings, load
from ps_accordion.errors import CodecError, ConfigError
from ps_accordion.layout import Layout, Tensor
from ps_accordion.patterns import MAX_TEXT, TensorCodec, TensorCodecs
from ps_accordion.regimes import Choice
from ps_accordion.selection import EXACT, Selection, check, unmatched

TABLE = [
    Tensor("encoder.0.weight", (64, 64), "float32"),
    Tensor("encoder.0.bias", (64,), "float32"),
    Tensor("head.weight", (64, 32), "float32"),
    Tensor("head.bias", (32,), "float32"),
    Tensor("running", (3000,), "float32", buffer=True),
]


def settings_of(rows, **options):
    """Return `[codec]` with a table of rows as TOML has them."""
    return CodecSettings(tensors=rows, **options)


def selected(rows, table=TABLE, **options):
    return Selection(settings_of(rows, **options), Layout(table, num_shards=1, partition_elements=4096))


def test_the_first_row_that_matches_decides():
    """In the order of the file, not by how much of the name a pattern has; where none matches, the job's codec counts."""
    rows = {"*.weight": "int", "encoder.*": {"codec": "topk", "light": 0.5}, "head.weight": "onebit"}
    light = selected(rows, name="qsgd").light
    assert light[:4] == (Choice("int", 8.0), Choice("topk", 0.5), Choice("int", 8.0), Choice("qsgd", 8.0))
    assert selected(dict(reversed(rows.items()))).light[:3] == (Choice("topk", 0.5),) * 2 + (Choice("onebit", 512.0),)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*.bias", "encoder.0.bias", True),
        ("bias", "encoder.0.bias", False),
        ("encoder.?.bias", "encoder.0.bias", True),
        ("encoder.?.bias", "encoder.10.bias", False),
        ("encoder.[0-3].*", "encoder.2.weight", True),
        ("encoder.[!0-3].*", "encoder.2.weight", False),
        ("Encoder.*", "encoder.0.bias", False),
        ("encoder.0.bias", "encoder.0.bias", True),
        ("encoder?0?bias", "encoder.0.bias", True),
    ],
)
def test_patterns_match_whole_names_as_file_names_are_matched(pattern, name, matches):
    """Stars run over dots, and case counts on every system."""
    assert (TensorCodecs.read({pattern: "int"}).of(name) is not None) == matches


def test_a_level_that_a_row_leaves_out_is_the_codec_s_own():
    """Not that of `[codec]`, which may be of another codec; the heavy one stays between the two of its own."""
    settings = settings_of({"a": "topk", "b": {"codec": "int", "heavy": 2}, "c": {"codec": "topk", "light": 0}}, light=0.3)
    assert settings.tensors.rows == (
        TensorCodec("topk", 0.04, 0.005, "a"),
        TensorCodec("int", 8.0, 2.0, "b"),
        TensorCodec("topk", 0.04, 0.005, "c"),
    )


def test_small_tensors_go_dense_and_as_exact_as_the_most_exact_in_their_key():
    """They share a key: a row for biases at 32 bits reaches all that are fused with them, and none makes them compressed."""
    keys = Layout(TABLE, num_shards=1, partition_elements=4096).keys
    buffers, small, head, encoder = keys
    assert (buffers.buffer, small.small, len(small.slices)) == (True, True, 2)
    compressed = selected({"*.bias": "topk"})
    assert [compressed.fixed(key) for key in (buffers, small, head, encoder)] == [EXACT, Choice("dense", 16.0), None, None]
    assert selected({"head.bias": "dense"}).fixed(small) == EXACT
    assert selected({"head.bias": {"codec": "dense", "light": 16}}).fixed(small) == Choice("dense", 16.0)
    assert selected({}, name="dense").fixed(small) == EXACT
    assert selected({"*.bias": "topk"}, name="dense").fixed(small) == Choice("dense", 16.0)


def test_the_table_is_the_same_from_a_file_a_variable_and_a_flag(tmp_path):
    """One form in three places: a TOML table, in the order in which it stands."""
    (tmp_path / "job.toml").write_text(
        '[codec]\nlight = 0.1\n[codec.tensors]\n"*.bias" = "dense"\n"e.*" = { codec = "topk", light = 0.1 }\n'
        '[codec.tensors."*"]\ncodec = "int"\n'
    )
    text = '{"*.bias" = "dense", "e.*" = {codec = "topk", light = 0.1}, "*" = {codec = "int"}}'
    from_file = load(tmp_path / "job.toml", environment={}).codec.tensors
    assert [row.pattern for row in from_file.rows] == ["*.bias", "e.*", "*"]
    assert load(environment={"PS_ACCORDION_CODEC_TENSORS": text}).codec.tensors == from_file
    assert load(environment={}, overrides={"codec.tensors": f" {text}\n"}).codec.tensors == from_file
    assert load(environment={"PS_ACCORDION_CODEC_TENSORS": ""}) == Settings()


def test_the_order_of_rows_is_a_term_of_the_job():
    """Two tables with the same rows are different if they decide differently, also to whoever compares terms."""
    one, other = (Settings(codec=settings_of(rows)) for rows in ({"a*": "int", "*b": "topk"}, {"*b": "topk", "a*": "int"}))
    assert one.codec.tensors != other.codec.tensors
    assert one.terms()["codec.tensors"] != other.terms()["codec.tensors"]
    assert Settings().with_terms(one.terms()).codec.tensors == one.codec.tensors


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('{"*.bias" = 5}', r"'\*\.bias': expected a codec, or a codec and its levels, .*got 5"),
        ('{"a" = {codec = "topk", hevy = 0.1}}', "'a': expected codec, light and heavy, got 'hevy'"),
        ('{"a" = {light = 0.1}}', "'a': expected the name of a codec, .*got None"),
        ('{"a" = {codec = "topk", light = -1}}', "'a': expected light to be a finite number at least 0, got -1"),
        ('{"a" = {codec = "topk", heavy = true}}', "'a': expected heavy to be a finite number"),
        ('{"a" = {codec = "topk", heavy = nan}}', "'a': expected heavy to be a finite number"),
        ('{"" = "topk"}', "expected patterns of printable characters"),
        ('{"a\\u0000" = "topk"}', "expected patterns of printable characters"),
        ("*.bias = dense", "expected an inline table of TOML"),
        ('{"a" = "topk"}\nseed = 1', "expected one inline table of TOML and nothing behind it"),
        ('["a"]', "expected a table of patterns"),
        ("{" + ", ".join(f'"tensor{number}.*" = "topk"' for number in range(50)) + "}", f"expected at most {MAX_TEXT}"),
    ],
)
def test_what_is_no_table_is_refused_with_the_row_and_the_source(value, said):
    """A wrong row names itself, and what a right one looks like."""
    with pytest.raises(ConfigError, match=rf"^command line: codec\.tensors.*{said}"):
        load(environment={}, overrides={"codec.tensors": value})


def test_an_unknown_codec_or_level_is_refused_with_its_row():
    """Before the run begins, and with the nearest name."""
    for rows, said in (
        ({"head.*": "topkk"}, r"^codec\.tensors 'head\.\*': expected a codec among .*'topkk'; did you mean 'topk'"),
        ({"head.*": {"codec": "int", "heavy": 3}}, r"^codec\.tensors 'head\.\*': .*got 3"),
    ):
        with pytest.raises(CodecError, match=said):
            check(settings_of(rows))
    with pytest.raises(CodecError, match=r"^expected a codec among .*'zzz'"):
        check(CodecSettings(name="zzz"))
    many = {f"a{number}": {"codec": "topk", "light": 0.01 * number + 0.01} for number in range(17)}
    with pytest.raises(ConfigError, match=r"comes to 1[789] different codecs and levels, and a plan has room for 16"):
        check(settings_of(many))


def test_a_row_that_decides_nothing_is_named_with_the_nearest_names():
    """A slip in a pattern would otherwise compress a tensor that nobody meant to, without a word."""
    rows = {"encodr.*": "int", "*.bias": "onebit", "head.*": "int", "head.weight": "topk", "running": "topk"}
    lost, small, hidden, buffers = unmatched(settings_of(rows), TABLE)
    assert lost.startswith("codec.tensors: 'encodr.*' decides about no tensor so far; the nearest names are encoder.0.")
    assert small == (
        "codec.tensors: '*.bias' = 'onebit' decides about small tensors only (encoder.0.bias), which always go dense"
    )
    assert hidden.startswith("codec.tensors: 'head.weight' decides about no tensor so far; the nearest names are head.weight")
    assert buffers.startswith("codec.tensors: 'running' decides about no tensor so far")
    assert list(unmatched(settings_of({"*.bias": "dense", "*": "topk"}), TABLE)) == []
