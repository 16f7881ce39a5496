"""The check that stands around every test, tried on tests that leave something behind."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from leaks import Watch

PLANTED = """
import gc, os, socket, subprocess, sys, tempfile, threading, time
import pytest
import leaks

leaks.PATIENCE = 0.2
KEPT = []
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_nothing():
    with socket.socket() as opened, tempfile.TemporaryFile():
        KEPT.append(opened)


def test_process():
    KEPT.append(subprocess.Popen(SLEEP))


def test_zombie():
    child = subprocess.Popen(["true"])
    while not open(f"/proc/{child.pid}/stat").read().rpartition(")")[2].split()[0] == "Z":
        time.sleep(0.001)
    KEPT.append(child)


def test_orphan():
    parent = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    subprocess.run([sys.executable, "-c", parent], check=True)


def test_thread():
    threading.Thread(target=time.sleep, args=(1,), name="planted", daemon=True).start()


def test_short_lived_thread():
    threading.Thread(target=time.sleep, args=(0.05,)).start()


def test_socket():
    KEPT.append(socket.socket())


def test_descriptor():
    KEPT.append(os.pipe())


def test_socket_in_a_cycle():
    cycle = [socket.socket()]
    cycle.append(cycle)


def test_file_in_the_working_directory():
    with open("planted", "w"):
        pass


def test_temporary_file():
    KEPT.append(tempfile.mkstemp()[1])


def test_variable():
    os.environ["PS_ACCORDION_SEED"] = "7"


def test_after_variable():
    assert "PS_ACCORDION_SEED" not in os.environ


@pytest.fixture(scope="module")
def forgetful():
    yield
    KEPT.append(socket.socket())


def test_that_ends_the_file(forgetful):
    pass
"""

EXPECTED = {
    "test_process": r"process \d+: .*time\.sleep\(60\)",
    "test_zombie": r"process \d+: ended, but nobody has waited for it",
    "test_orphan": r"process \d+: .*time\.sleep\(60\)",
    "test_thread": r"thread 'planted'",
    "test_socket": r"descriptor \d+: socket:",
    "test_descriptor": r"descriptor \d+: pipe:",
    "test_socket_in_a_cycle": r"ResourceWarning: unclosed <socket",
    "test_file_in_the_working_directory": r"file .*/w/planted",
    "test_temporary_file": r"file .*/t/tmp",
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Run tests that leave things behind in a pytest of their own; return what it printed."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "test_planted.py").write_text(PLANTED)
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-rA", "--tb=short", "--basetemp=base"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("test", EXPECTED)
def test_a_leak_fails_the_test_that_left_it_and_is_named(planted: str, test: str) -> None:
    """Each kind of leftover is an error of its own test, with enough said to find it."""
    section = re.search(rf"_ ERROR at teardown of {test} _(.*?)\n___|_ {test} _(.*?)\n___", planted, re.DOTALL)
    assert section, planted
    assert re.search(EXPECTED[test], section[0]), section[0]


def test_only_the_leaking_tests_fail(planted: str) -> None:
    """Closed sockets, threads that end by themselves and set variables are no leaks; a leak is reported once."""
    failed = set(re.findall(r"^(?:ERROR|FAILED) test_planted\.py::(\w+)", planted, re.MULTILINE))
    assert failed == {*EXPECTED, "test_that_ends_the_file"}, planted


def test_a_leak_of_a_fixture_of_the_file_is_reported_for_the_file(planted: str) -> None:
    """What outlives a test by right must end with the file."""
    assert re.search(r"test_planted\.py, in fixtures of module or class scope, left behind:\n\s+descriptor \d+: socket", planted)


def test_a_look_is_cheap(watch: Watch) -> None:
    """Hundreds of tests take two looks each: the fastest of a few takes less than half a millisecond of processor time."""
    costs = []
    for _ in range(20):
        start = time.thread_time()
        watch.look()
        costs.append(time.thread_time() - start)
    assert min(costs) < 0.5e-3
