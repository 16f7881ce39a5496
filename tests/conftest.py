"""What holds for every test: it starts from a clean environment and leaves nothing behind."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import zmq
from hypothesis.configuration import set_hypothesis_home_dir
from leaks import Watch

ROOT = Path(__file__).resolve().parent.parent

# The same examples on every run and every machine: a failure that only some people see is worth little.
# `--hypothesis-profile=explore` looks further, and remembers what it finds.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("explore", max_examples=2000, deadline=None)
hypothesis.settings.load_profile("repeatable")
set_hypothesis_home_dir(ROOT / ".hypothesis")

ENVIRONMENT = ("PS_ACCORDION_", "DMLC_", "BYTEPS_", "SLURM_", "OMPI_", "PMI_", "TORCHELASTIC_", "GROUP_", "LOCAL_")
"""Variables that tell a process its place in a run, or the settings of one: ours and those of the launchers we read."""
ENVIRONMENT_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _start_collector_of_pyzmq() -> None:
    # The first message sent without a copy starts a thread of pyzmq's, with descriptors, that lives as long as the process.
    context = zmq.Context()
    with context.socket(zmq.PAIR) as left, context.socket(zmq.PAIR) as right:
        left.bind("inproc://collector")
        right.connect("inproc://collector")
        left.send(bytes(1 << 20), copy=False, track=True)
        received = right.recv(copy=False)
        del received
    context.term()


def _start_group_of_one() -> None:
    # The group of our wrapper's parent has threads and descriptors, and lives as long as the process.
    from ps_accordion.worker.group import group_of_one

    group_of_one()


def _start_gpu() -> None:
    # The first tensor on a GPU opens the driver's descriptors, which stay open as long as the process.
    import torch

    torch.ones(8, device="cuda").sum().item()
    torch.empty(8, pin_memory=True)


@pytest.fixture(scope="session")
def watch(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Watch]:
    """Give the run its own working and temporary directory, so that a file left in either is seen."""
    base = tmp_path_factory.getbasetemp()  # Fixed before TMPDIR changes, or pytest would make it inside.
    work, temporary = base / "w", base / "t"
    work.mkdir()
    temporary.mkdir()
    before = Path.cwd(), os.environ.get("TMPDIR"), tempfile.tempdir
    os.chdir(work)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    # torch makes this folder when a part of it is first imported, which may be in any test.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(base / "inductor")
    _start_collector_of_pyzmq()
    _start_group_of_one()
    if any(item.get_closest_marker("cuda") for item in request.session.items):
        _start_gpu()
    yield Watch([work, temporary])
    os.chdir(before[0])
    tempfile.tempdir = before[2]
    if before[1] is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before[1]


@pytest.fixture(scope="session", autouse=True)
def _run_leaves_nothing(watch: Watch) -> Iterator[None]:
    with watch.over("the run, in fixtures of session scope,"):
        yield


@pytest.fixture(scope="module", autouse=True)
def _file_leaves_nothing(watch: Watch, request: pytest.FixtureRequest) -> Iterator[None]:
    with watch.over(f"{request.node.nodeid}, in fixtures of module or class scope,"):
        yield


@pytest.fixture(autouse=True)
def _test_leaves_nothing(watch: Watch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test that leaves a process, thread, descriptor or file behind.

    It is set up after the fixtures of wider scope and before all others of the test, so it is torn down after those.
    """
    with watch.over(request.node.nodeid):
        yield


@pytest.fixture(autouse=True)
def _clean_environment(_test_leaves_nothing: None) -> Iterator[None]:
    """Hide the variables of a surrounding run from the test, and what the test sets from the next."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if _tells_a_place(name)}
    yield
    for name in list(os.environ):
        if _tells_a_place(name):
            del os.environ[name]
    os.environ.update(hidden)


def _tells_a_place(name: str) -> bool:
    return name.startswith(ENVIRONMENT) or name in ENVIRONMENT_NAMES
