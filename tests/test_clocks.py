"""Nothing is decided by a clock that somebody may set: a jump of an hour, either way, changes nothing."""

import ast
from pathlib import Path

import ps_accordion

ROOT = Path(ps_accordion.__file__).parent
WALL = {
    ("time", "time"),
    ("time", "time_ns"),
    ("time", "localtime"),
    ("time", "gmtime"),
    ("time", "strftime"),
    ("time", "ctime"),
    ("datetime", "now"),
    ("datetime", "utcnow"),
    ("datetime", "today"),
}
SAID = {
    "telemetry/events.py": 1,  # when a line was written
    "telemetry/trace.py": 1,  # where the spans of one machine lie beside those of another
    "coordinator/log.py": 1,  # when a term began
    "launcher/local.py": 1,  # the name of a run directory
}
"""Where the time of day is written down for people, and how often. No role reads it again."""


def readings(file: Path) -> int:
    """Count where a file reads the wall clock."""
    found = 0
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += (node.value.id, node.attr) in WALL
        elif isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
            found += sum((node.module, alias.name) in WALL for alias in node.names)
    return found


def test_no_role_reads_the_wall_clock_for_a_decision():
    """Timeouts, back-off and the order of failures go by the monotonic clock, which nobody sets."""
    found = {}
    for folder in [ROOT, *(link for link in ROOT.iterdir() if link.is_dir())]:
        for file in folder.glob("*.py") if folder == ROOT else folder.rglob("*.py"):
            if count := readings(file):
                found[file.relative_to(ROOT).as_posix()] = count
    assert found == SAID
