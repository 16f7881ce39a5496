"""How a run ends when something happens in the middle of a backward: the true cause is on the screen, and nobody waits."""

import os
import signal
import time

import pytest

SCRIPT = '''
import os, sys, threading
import torch
from torch import nn
from ps_accordion.worker import DistributedModel, connect

class Stop(Exception):
    """What user code raises."""

with connect() as session:
    torch.manual_seed(0)
    model = DistributedModel(nn.Linear(64, 64))
    model(torch.ones(4, 64)).sum().backward()
    model.zero_grad()
    if session.rank == 1:
        print("pid", os.getpid(), flush=True)
        {other}
    else:
        # Backward reaches the bias first, then waits for worker 1, which never comes.
        model.module.weight.register_hook(lambda _: print("backward", os.getpid(), flush=True))
        model(torch.ones(4, 64)).sum().backward()
'''
SMALL = ("launch", "--workers", "2", "--servers", "1", "--set", "timeouts.grace=3")


@pytest.fixture
def run(start_command, tmp_path):
    """Start a run in which worker 1 does `other` while worker 0 waits in backward; return it and worker 0's process number."""

    def start(other):
        file = tmp_path / "train.py"
        file.write_text(SCRIPT.format(other=other), encoding="utf-8")
        process = start_command(*SMALL, "--", "python", str(file))
        return process, int(process.line_with("[worker 0] backward").split()[-1])

    return start


def test_ctrl_c_reaches_a_worker_that_waits_in_backward(run):
    """The process in backward is interrupted like any other, and names itself as the cause."""
    process, pid = run("threading.Event().wait()")
    begin = time.monotonic()
    os.kill(pid, signal.SIGINT)
    code, _, error = process.end()
    assert time.monotonic() - begin < 20
    assert code == 130, error
    assert "KeyboardInterrupt" in error[error.rindex("---- worker 0 failed") :]


def test_an_exception_in_user_code_ends_a_backward_of_another_worker(run):
    """The last thing on the screen is the user's own traceback; the other worker says whose fault it was."""
    process, _ = run('raise Stop("the data is gone")')
    code, _, error = process.end()
    assert code == 1, error
    assert "Stop: the data is gone" in error[error.rindex("---- worker 1 failed") :]
    assert "worker 1 ended with Stop: the data is gone" in error


@pytest.mark.parametrize("thread", ["io", "codec"])
def test_an_exception_in_a_thread_of_ours_ends_the_backward_with_that_cause(run, thread):
    """A defect of our own code does not hang anybody: it comes out of backward, and of the session, as what it is."""
    inner = "self.session.client.call" if thread == "io" else "self.session.client.codecs.submit"
    arguments = "crash" if thread == "io" else "0, crash"
    other = f"""
        def crash():
            raise ArithmeticError("a defect in the {thread} thread")
        {inner.replace("self.", "")}({arguments})
        model(torch.ones(4, 64)).sum().backward()
    """
    process, _ = run(other.strip())
    code, _, error = process.end()
    assert code == 1, error
    assert f"ArithmeticError: a defect in the {thread} thread" in error[error.rindex("---- worker 1 failed") :]
