"""The examples run as the README says, and the difference between them is the one that it shows."""

import difflib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
DIFFERENCES = [("plain.py", "train.py", 5), ("ddp.py", "from_ddp.py", 3)]
"""(before, after, how many lines may change)."""
SECONDS = 100
"""More than it takes on a busy machine with cold kernels; reached only when something hangs."""


def run(command, directory):
    """Run a command; return (exit code, lines of output, standard error). What it started ends with it."""
    # torch leaves an empty cache folder in the temporary directory when an optimizer is used.
    environment = os.environ | {"TMPDIR": str(directory), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=directory, env=environment, start_new_session=True, **pipes) as process:
        try:
            output, error = process.communicate(timeout=SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output.splitlines(), error


def accuracy(lines):
    """Return the accuracy in the last of some lines."""
    return float(lines[-1].rpartition(" ")[2])


def test_the_example_trains_under_launch_as_well_as_alone(tmp_path):
    """Two workers end with one and the same accuracy, about that of the plain script."""
    code, output, error = run([sys.executable, str(EXAMPLES / "plain.py")], tmp_path)
    assert (code, error) == (0, "")
    assert accuracy(output) > 0.98
    command = ["launch", "--workers", "2", "--servers", "1", "--", "python", str(EXAMPLES / "train.py")]
    code, together, error = run([sys.executable, "-P", "-m", "ps_accordion.launcher", *command], tmp_path)
    assert code == 0, error
    said = [[line for line in together if line.startswith(f"[worker {rank}] accuracy")] for rank in (0, 1)]
    assert [len(lines) for lines in said] == [1, 1], together
    assert accuracy(said[0]) == accuracy(said[1])
    assert abs(accuracy(said[0]) - accuracy(output)) < 0.01


@pytest.mark.parametrize(("before", "after", "most"), DIFFERENCES)
def test_the_readme_shows_the_real_difference(before, after, most):
    """The diffs in the README are those of the files, and change as few lines as it says."""
    texts = ((EXAMPLES / name).read_text(encoding="utf-8").splitlines() for name in (before, after))
    lines = list(difflib.unified_diff(*texts, f"examples/{before}", f"examples/{after}", lineterm="", n=1))
    shown = re.findall(r"^```diff\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert "\n".join(lines) + "\n" in shown
    assert len(shown) == len(DIFFERENCES)
    assert changed(lines[2:]) <= most


def changed(lines):
    """Count the lines of a diff that are new, gone, or other than before; empty ones do not count."""
    kinds = "".join(line[0] for line in lines if line[1:].strip())
    return sum(max(block.count("+"), block.count("-")) for block in re.findall(r"-*\+*", kinds))


def test_lines_that_change_are_counted():
    """A line in another's place counts once, an addition and a removal each; context and empty lines do not."""
    assert changed(["@@ -1 +1 @@", " a", "-b", "+c", "+", "+d", " e", "+f"]) == 3
    assert changed(["-a", "-b", "-", "+c", "@@ -1 +1 @@", "+d"]) == 3
