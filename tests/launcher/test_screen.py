import io

from ps_accordion.launcher.screen import Screen


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_lines_are_plain_and_keep_their_stream():
    """A log file holds no colours."""
    output, error = io.StringIO(), io.StringIO()
    with Screen(output=output, error=error) as screen:
        screen.line("worker 0", "to output", error=False)
        screen.line("worker 0", "to error", error=True)
        screen.say("hello")
    assert output.getvalue() == "[worker 0] to output\n"
    assert error.getvalue() == "[worker 0] to error\n[launch] hello\n"


def test_without_a_terminal_progress_is_a_line_every_few_seconds():
    """Progress does not flood a log: two lines at once are one."""
    error = io.StringIO()
    with Screen(error=error) as screen:
        screen.progress("step 1")
        screen.progress("step 2")
    assert error.getvalue() == "[launch] step 1\n"


def test_without_a_terminal_nothing_is_said_twice(monkeypatch):
    """A line that has not changed since is no news, however long it lasts."""
    monkeypatch.setattr("ps_accordion.launcher.screen.LINE_SECONDS", 0.0)
    error = io.StringIO()
    with Screen(error=error) as screen:
        for text in ("step 1", "worker 1: evaluation", "worker 1: evaluation", "step 1"):
            screen.progress(text)
    assert error.getvalue() == "[launch] step 1\n[launch] worker 1: evaluation\n[launch] step 1\n"


def test_progress_can_be_turned_off():
    """--progress none shows none, on a terminal or not."""
    for error in (io.StringIO(), Terminal()):
        with Screen("none", error=error) as screen:
            screen.progress("step 1")
        assert error.getvalue() == ""


def test_on_a_terminal_progress_stays_below_the_lines(monkeypatch):
    """The progress line is taken away before a line is printed, and drawn again below it; names are coloured."""
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    with Screen(output=terminal, error=terminal) as screen:
        screen.progress("step 1 [not markup]")
        screen.line("worker 1", "an [odd] line", error=False)
        screen.progress("step 2")
    shown = terminal.getvalue()
    assert "\x1b[36m[worker 1] \x1b[0man [odd] line" in shown
    assert "step 1 [not markup]" in shown
    assert shown.index("an [odd] line") < shown.rindex("step 1") < shown.rindex("step 2")
    assert "\x1b[2K" in shown
