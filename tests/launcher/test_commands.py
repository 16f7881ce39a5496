import importlib.util
import json

import pytest
from suites import usually

from ps_accordion import codecs, compression
from ps_accordion.errors import ConfigError
from ps_accordion.launcher import codec_rivals, codec_speed
from ps_accordion.launcher.commands import bench, bench_codecs, demo


def test_cases_are_read_as_codec_and_level():
    """codec:level,codec:level."""
    cases = bench.parse_cases("topk:0.01, dense:32,dense:32:socket")
    assert cases == [("topk", 0.01, True), ("dense", 32.0, True), ("dense", 32.0, False)]
    assert list(map(str, cases)) == ["topk:0.01", "dense:32", "dense:32:socket"]


@pytest.mark.parametrize("text", ["topk", "topk:", "topk:much", ":0.1", "", "topk:0.1,"])
def test_malformed_cases_show_the_form(text):
    """What came is quoted, and the right form named."""
    with pytest.raises(ConfigError, match="expects codec:level, such as"):
        bench.parse_cases(text)


def test_every_codec_has_a_light_and_a_heavy_level_to_be_measured_at():
    """A codec that is registered appears without being named anywhere."""
    assert {case.codec for case in bench_codecs.cases_of("")} == set(codecs.names())
    assert bench_codecs.cases_of("topk") == [("topk", level) for level in compression.LEVELS["topk"]]
    assert bench_codecs.cases_of("topk:0.3, dense:16") == [("topk", 0.3), ("dense", 16.0)]


@pytest.mark.parametrize(("text", "wanted"), [("topkk", "among bf16, dense, .*got 'topkk'"), ("topk:much", "name or name:level")])
def test_codecs_that_do_not_exist_are_not_measured(text, wanted):
    """What came is quoted, and what is legal named."""
    with pytest.raises(ConfigError, match=wanted):
        bench_codecs.cases_of(text)


@pytest.mark.timeout(300)  # some 300 operations, a third of a second each where there are two threads
@pytest.mark.parametrize("threads", usually([1, 2], 1))
def test_every_operation_of_every_codec_is_a_row(tmp_path, capsys, threads):
    """The names of a row are promised; an operation that a codec does not have is no row."""
    assert bench_codecs.codecs(elements=3000, threads=threads, json_file=tmp_path / "rows.json") == 0
    written = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    rows, loops = written["rows"], [row for row in written["beside"] if row["codec"] == "kernels"]
    assert [(row["op"], row["threads"]) for row in loops] == [("read", threads), ("sum", threads), ("rotate", threads)]
    names = {"codec", "op", "level", "n", "threads", "ms", "gbps", "vs_memcpy", "bytes_per_element", "sq_error"}
    assert all(set(row) == names and row["ms"] > 0 and row["threads"] == threads for row in rows)
    for name in codecs.names():
        ops = {row["op"] for row in rows if row["codec"] == name}
        assert {"encode_feedback", "encode_in_place", "reencode", "decode", "fold2", "fold4", "fold8", "answer8"} <= ops
        assert ("linear_sum8" in ops) == codecs.get(name).linear
    shown = capsys.readouterr().out
    assert [words for words in ("squared error: gaussian", "encode_feedback", "topk 0.04: ") if words not in shown] == []


def test_what_people_use_today_is_timed_beside_our_codecs():
    """PyTorch's cast, top k and PowerSGD, with the fields of our rows; nothing beside other codecs."""
    beside = {
        ("dense", 16.0): [("torch fp16", "encode"), ("torch fp16", "decode")],
        ("topk", 0.01): [("torch topk", "encode_feedback")],
        ("powersgd", 2.0): [("torch powersgd", "encode_feedback")],
        ("onebit", 8192.0): [],
    }
    for case, expected in beside.items():
        rows = list(codec_rivals.rivals_of(codec_speed.Case(*case), 64 * 64))
        assert [(row["codec"], row["op"]) for row in rows] == expected
        assert all(row["n"] == 4096 and row["ms"] > 0 and row["vs_memcpy"] > 0 and row["threads"] == 1 for row in rows)


def test_codecs_are_measured_for_a_plan_as_bench_measures_them():
    """A copy that no cache holds comes with them."""
    row = codec_speed.measure_copy(1000)
    assert (row["op"], row["n"]) == ("copy", 1000)
    assert row["ms"] > 0


def test_an_error_is_what_the_vector_loses():
    """Dense loses nothing, the largest hundredth of a vector that has no more is all of it, and half of it is not."""
    for name, level, kind, expected in (("dense", 32, "t2", 0), ("topk", 0.02, "1% dense", 0), ("topk", 0.1, "gaussian", 0.56)):
        errors = codec_speed.squared_errors(codecs.get(name), level, 100_000)
        assert list(errors) == list(codec_speed.DISTRIBUTIONS)
        assert errors[kind] == pytest.approx(expected, abs=0.01)


def test_a_demo_without_scikit_learn_says_how_to_install_it(monkeypatch):
    """One sentence with the pip command, before anything starts."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        demo.demo()


@pytest.mark.parametrize(("flag", "value"), [("--workers", "3"), ("--epochs", "0"), ("--workers", "0")])
def test_a_demo_that_cannot_run_is_refused(command, flag, value):
    """The flag is named with its value, before anything starts."""
    code, output, error = command("demo", flag, value)
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert "command line: " in error


@pytest.mark.full
def test_the_demo_ends_with_its_figures(command, tmp_path):
    """All that is promised of --json is there, and agrees with itself; all workers ended with equal parameters."""
    # torch leaves an empty cache folder in the temporary directory when an optimizer is used.
    code, output, error = command("demo", "--epochs", "2", "--json", "demo.json", TMPDIR=str(tmp_path))
    assert code == 0, error
    figures = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    moved = figures["push_bytes"] + figures["pull_bytes"]
    assert figures["ratio"] == pytest.approx(figures["dense_bytes"] / moved, rel=1e-3)
    assert figures["rounds"] == sum(figures["rounds_by_regime"].values()) == 44
    assert figures["dense_bytes"] == 44 * 2 * 4 * 151_306
    assert figures["regime_switches"] == len(figures["switches"])
    assert {"accuracy", "dense_accuracy", "seconds"} <= set(figures)
    assert "Where the" in output


@pytest.mark.full
def test_the_benchmark_ends_with_its_rows(command, tmp_path):
    """Each case is a row with the promised names; uncompressed, the result has been compared with gloo's."""
    code, _, error = command("bench", "pushpull", "--elements", "300000", "--pairs", "2", "--json", "rows.json")
    assert code == 0, error
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]
    names = {"case", "codec", "level", "workers", "servers", "link", "ms", "baseline", "baseline_ms", "ratio"}
    assert [row["case"] for row in rows] == ["topk:0.01", "dense:32", "dense:32:socket"]
    assert not any(names - set(row) for row in rows)
    assert rows[0]["fewer_bytes"] > 50
    kinds = {f"{who} {what}" for who, its in (("worker", "codec"), ("server", "shards")) for what in (its, "sockets", "zeromq")}
    assert all(set(row["cpu_ms"]) == kinds and min(row["cpu_ms"].values()) > 0 for row in rows)


@pytest.mark.full
def test_the_benchmark_of_a_step_ends_with_its_rows(command, tmp_path):
    """A row of each case beside each baseline; uncompressed, all parameters have been compared with those of the first."""
    sizes = ("--layers", "2", "--width", "128", "--pairs", "2", "--cases", "topk:0.01,dense:32", "--baselines", "ddp,ddp_fp16")
    code, _, error = command("bench", "step", *sizes, "--json", "rows.json")
    assert code == 0, error
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["case"], row["baseline"]) for row in rows] == [
        (case, baseline) for case in ("topk:0.01", "dense:32") for baseline in ("ddp", "ddp_fp16")
    ]
    assert all(row["elements"] == 2 * 128 * 129 and min(row["ms"], row["baseline_ms"], row["alone_ms"]) > 0 for row in rows)


def test_a_baseline_that_nobody_knows_is_refused(command):
    """The flag is named, with what it knows, before anything starts."""
    code, output, error = command("bench", "step", "--baselines", "ddp,horovod")
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert "--baselines expects some of ddp, ddp_fp16, ddp_powersgd; got 'horovod'" in error
