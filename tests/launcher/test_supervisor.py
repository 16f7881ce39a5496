import os
import signal
import time


def test_output_is_prefixed_and_a_run_that_ends_well_ends_with_zero(engine):
    """Each line carries the name of the child that wrote it, on the stream it was written to."""
    code, output, error = engine("worker 0=echo to output", "worker 1=echo to error >&2").end()
    assert (code, output) == (0, "[worker 0] to output\n")
    assert "[worker 1] to error\n" in error


def test_the_failed_childs_own_error_comes_last(engine):
    """Whatever others print while they end, the reason stands at the bottom."""
    process = engine(
        "worker 0=echo reason >&2; exit 3", "worker 1=trap 'echo noise >&2; exit 5' TERM; sleep 60 & wait", grace=0.3
    )
    code, _, error = process.end()
    lines = error.splitlines()
    assert code == 3
    assert "[worker 1] noise" in lines
    assert lines[-3].startswith("---- worker 0 failed: exit code 3, after")
    assert lines[-2:] == ["reason", "ENDING 3 worker 0"]


def test_a_killed_child_gives_128_plus_the_signal(engine):
    """The exit code of a child killed by signal N is 128 + N, as in a shell."""
    code, _, error = engine("worker 0=kill -9 $$", "worker 1=sleep 60", grace=0.2).end()
    assert code == 137
    assert "worker 0 failed: exit code 137, killed by SIGKILL" in error


def test_a_child_that_ignores_sigterm_is_killed_after_two_graces(engine):
    """A failure ends the whole run within twice the grace."""
    start = time.monotonic()
    code, _, _ = engine("worker 0=exit 4", "server 0=trap '' TERM INT; while true; do sleep 1; done", grace=0.5).end()
    assert code == 4
    assert time.monotonic() - start < 5


def test_ctrl_c_ends_all_with_130(engine, ends_within):
    """SIGINT reaches the workers, the roles follow, and the exit code says that it was an interrupt."""
    process = engine("coordinator=sleep 60", "worker 0=trap 'echo saved; exit 0' INT; echo ready; sleep 60 & wait")
    process.line_with("ready")
    process.popen.send_signal(signal.SIGINT)
    code, output, _ = process.end()
    assert (code, "[worker 0] saved" in output) == (130, True)


def test_a_second_ctrl_c_kills_at_once(engine):
    """Two interrupts do not wait for the grace of 60 s."""
    process = engine("worker 0=trap 'echo asked' INT; echo ready; while true; do sleep 0.1; done", grace=60)
    process.line_with("ready")
    process.popen.send_signal(signal.SIGINT)
    process.line_with("asked")
    process.popen.send_signal(signal.SIGINT)
    assert process.end()[0] == 130


def test_sigterm_ends_all_with_143(engine):
    """A supervisor above us, such as a batch system, ends the run with SIGTERM."""
    process = engine("coordinator=echo ready; sleep 60", "worker 0=sleep 60")
    process.line_with("ready")
    process.popen.terminate()
    assert process.end()[0] == 143


def test_what_a_finished_child_left_running_ends_too(engine, ends_within):
    """A worker's own background process does not outlive the run."""
    process = engine("worker 0=sleep 60 >/dev/null 2>&1 & echo pid $!")
    pid = int(process.line_with("pid").split()[-1])
    assert process.end()[0] == 0
    assert ends_within(pid, 0.0)


def test_a_process_of_its_own_group_in_the_same_session_ends_too(engine, ends_within):
    """Job control puts background jobs into groups of their own: the session is what is ended."""
    process = engine("worker 0=set -m; sleep 60 >/dev/null 2>&1 & echo pid $!; exit 3", grace=0.2)
    pid = int(process.line_with("pid").split()[-1])
    assert process.end()[0] == 3
    assert ends_within(pid, 0.0)


def test_no_orphan_when_the_launcher_is_killed(engine, ends_within):
    """After SIGKILL of the launcher, children and their children are gone within 2 s."""
    process = engine(
        "coordinator=echo pid $$; sleep 60",
        "worker 0=trap '' TERM HUP INT; bash -c 'echo pid $$; sleep 60; true' & echo pid $$; wait",
    )
    pids = [int(process.line_with("pid").split()[-1]) for _ in range(3)]
    os.kill(process.popen.pid, signal.SIGKILL)
    assert [ends_within(pid, 2.0) for pid in pids] == [True] * 3


def test_no_orphan_when_the_launchers_whole_group_is_killed(engine, ends_within):
    """The guard has a session of its own, so that what kills the launcher's group does not kill the guard."""
    process = engine("worker 0=bash -c 'echo pid $$; sleep 60; true'; true")
    pid = int(process.line_with("pid").split()[-1])
    os.killpg(process.popen.pid, signal.SIGKILL)
    assert ends_within(pid, 2.0)


def test_output_that_nobody_reads_any_more_ends_the_run(engine, ends_within):
    """A closed pipe behind us, as of `| head`, is an end like any other: no child stays."""
    process = engine("worker 0=echo pid $$; while true; do echo more; sleep 0.05; done")
    pid = int(process.line_with("pid").split()[-1])
    process.popen.stdout.close()
    assert process.popen.wait(10) != 0
    assert ends_within(pid, 0.0)
