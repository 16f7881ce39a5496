import pytest

from ps_accordion.errors import ConfigError
from ps_accordion.launcher.child import MAX_LINE, Child, Guard, LineReader, Program


def test_lines_are_cut_at_line_ends_wherever_the_chunks_end():
    """A line that comes in pieces is one line."""
    reader = LineReader()
    assert reader.feed(b"one\ntw") == ["one"]
    assert reader.feed(b"o\r\nthree") == ["two"]
    assert reader.feed(b"") == ["three"]
    assert reader.feed(b"") == []


def test_a_rewritten_line_shows_what_it_says_last():
    """Progress bars rewrite their line with carriage returns."""
    assert LineReader().feed(b" 10%\r 50%\r100%\n") == ["100%"]


def test_output_without_line_ends_is_cut_in_parts():
    """A program that never ends its line does not fill our memory."""
    (part,) = LineReader().feed(b"x" * (MAX_LINE + 1))
    assert len(part) == MAX_LINE + 1


def test_bytes_that_are_not_text_are_shown_all_the_same():
    """Output is shown, never refused."""
    assert LineReader().feed(b"\xff!\n") == ["\ufffd!"]


def test_a_program_that_does_not_exist_is_named():
    """The message says what could not be run."""
    with Guard() as guard, pytest.raises(ConfigError, match="worker 0: cannot run '/no/such/program'"):
        Child(Program("worker 0", "worker", ("/no/such/program",), {}), guard)


def test_a_guard_that_was_killed_is_started_again_and_told_everything(tmp_path):
    """Killing the guard alone does not take the protection away."""
    kept = tmp_path / "sockets"
    kept.mkdir()
    with Guard() as guard:
        guard.remove_at_end(kept)
        guard._process.kill()
        guard._process.wait()
        guard.check()
        assert kept.exists()
    assert not kept.exists()
