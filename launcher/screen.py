"""What the launcher shows: children's lines with their names before them, and one progress line.

On a terminal the names are coloured and the progress line stays at the bottom, on standard error.
Elsewhere every line is plain, and progress is one line every few seconds, so that a log file stays readable.
A child's standard output goes to ours and its standard error to ours.
"""

from __future__ import annotations

import sys
import time
from typing import Literal, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

__all__ = ["ProgressMode", "Screen"]

ProgressMode = Literal["auto", "line", "none"]

LINE_SECONDS = 5.0
"""Time between two plain progress lines."""
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta", "bright_green")


class Screen:
    """Standard output and standard error of the launcher. A context manager."""

    def __init__(self, progress: ProgressMode = "auto", *, output: TextIO | None = None, error: TextIO | None = None) -> None:
        """Args: `progress`, how to show it (auto: live on a terminal); `output` and `error`, the streams to use."""
        self._output = sys.stdout if output is None else output
        self._error = sys.stderr if error is None else error
        self._mode = progress
        self._console = Console(file=self._error, highlight=False) if self._error.isatty() else None
        self._live: Live | None = None
        self._last_line = 0.0
        self._shown = ""
        self._colours: dict[str, str] = {}

    def line(self, name: str, text: str, *, error: bool) -> None:
        """Show one line that a child wrote to its standard output, or error."""
        stream = self._error if error else self._output
        if self._console is not None and stream.isatty():
            colour = self._colours.setdefault(name, _COLOURS[len(self._colours) % len(_COLOURS)])
            self._console.print(Text.assemble((f"[{name}] ", colour), Text.from_ansi(text)), soft_wrap=True)
        else:
            stream.write(f"[{name}] {text}\n")
            stream.flush()

    def say(self, text: str) -> None:
        """Show a line of the launcher itself, on standard error."""
        if self._console is not None:
            self._console.print(Text.assemble(("[launch] ", "bold"), text), soft_wrap=True)
        else:
            self._error.write(f"[launch] {text}\n")
            self._error.flush()

    def heading(self, text: str) -> None:
        """Show a heading on standard error; what follows it is the last thing on the screen."""
        self.close()
        if self._console is not None:
            self._console.rule(Text(text, style="bold red"), style="red", align="left")
        else:
            self._error.write(f"---- {text} ----\n")
            self._error.flush()

    def plain(self, text: str) -> None:
        """Show a line without a prefix, on standard error."""
        self._error.write(f"{text}\n")
        self._error.flush()

    def progress(self, text: str) -> None:
        """Show how far the run is. In a log, what stands there already is not said again."""
        if self._mode == "auto" and self._console is not None:
            shown = Text(text, style="bold", no_wrap=True, overflow="ellipsis")
            if self._live is None:
                self._live = Live(shown, console=self._console, auto_refresh=False, transient=False)
                self._live.start(refresh=True)
            else:
                self._live.update(shown, refresh=True)
        elif self._mode != "none" and text != self._shown and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line, self._shown = time.monotonic(), text
            self._error.write(f"[launch] {text}\n")
            self._error.flush()

    def close(self) -> None:
        """Leave the last progress line where it is and stop updating it."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
