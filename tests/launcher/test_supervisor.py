import json
import os
import re
import signal
import time

import pytest

DIES_ONCE = '[ "$PS_ACCORDION_RESTART" ] || kill -9 $$; '
"""Begins a command that is killed in its first life."""


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
    code, _, error = engine("worker 0=kill -9 $$", "worker 1=sleep 60", grace=0.2, minimum=2).end()
    assert code == 137
    assert (
        "[launch] worker 0 ended with exit code 137, killed by SIGKILL; 1 worker left, and workers.minimum is 2: ending" in error
    )
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


@pytest.mark.parametrize("name", ["coordinator", "server 0", "worker 0"])
def test_a_killed_child_is_started_again(engine, tmp_path, name):
    """The screen says who, of what, when and how often; the child knows that it is a second life; the run ends well."""
    os.mkfifo(tmp_path / "go")
    code, output, error = engine(
        f"{name}={DIES_ONCE} echo life $PS_ACCORDION_RESTART; echo > {tmp_path / 'go'}",
        f"worker 1=read < {tmp_path / 'go'}",
        restarts=3,
    ).end()
    assert (code, output) == (0, f"[{name}] life 1\n"), error
    said = rf"^\[launch\] {name} was killed by SIGKILL after \d+\.\d s; starting it again in 0\.1 s \(restart 1 of 3\)$"
    assert re.search(said, error, re.MULTILINE)
    assert "failed" not in error


def test_the_others_go_on_without_a_worker_that_is_killed_too_often(engine, tmp_path):
    """The screen and the log say so at once; the run ends with that worker's code, and what it wrote last."""
    os.mkfifo(tmp_path / "go")
    file = tmp_path / "events-launcher.jsonl"
    process = engine(
        "worker 0=echo reason >&2; kill -9 $$",
        f"worker 1=read < {tmp_path / 'go'}; echo saved",
        restarts=1,
        pause=0.01,
        events=file,
    )
    said = process.error_with("without it")
    assert said == (
        "[launch] worker 0 ended with exit code 137, killed by SIGKILL, after as many restarts as it has (1, run.restarts); "
        "the others go on without it: 1 worker left"
    )
    (tmp_path / "go").write_text("")
    code, output, error = process.end()
    assert (code, output) == (137, "[worker 1] saved\n")
    assert error.splitlines()[-2:] == ["reason", "ENDING 137 worker 0"]
    events = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    told = [{**event, "time": 0} for event in events if event["event"] in ("lost", "phase")]
    assert told[0] == {"time": 0, "event": "lost", "name": "worker 0", "left": 1, "needed": 1}
    assert [event["phase"] for event in told[1:]] in (["done"], ["draining", "done"])


def test_events_tell_of_starts_exits_and_restarts(engine, tmp_path):
    """Enough to see afterwards who was which process when."""
    file = tmp_path / "events-launcher.jsonl"
    code, output, _ = engine(f"worker 0={DIES_ONCE} echo pid $$", restarts=2, pause=0.01, events=file).end()
    events = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    first, pid = events[0].pop("pid"), int(output.split()[-1])
    assert (code, first != pid) == (0, True)
    for event in events:
        del event["time"]
        assert event.pop("seconds", 0) >= 0
    assert events == [
        {"event": "start", "name": "worker 0", "restart": 0},
        {"event": "exit", "name": "worker 0", "pid": first, "code": 137},
        {"event": "restart", "name": "worker 0", "number": 1, "allowed": 2, "pause": 0.01},
        {"event": "start", "name": "worker 0", "pid": pid, "restart": 1},
        {"event": "exit", "name": "worker 0", "pid": pid, "code": 0},
        {"event": "phase", "phase": "done"},
    ]


def test_after_its_last_restart_a_killed_child_ends_the_run(engine):
    """With its code, and what its last life wrote at the bottom."""
    code, output, error = engine(
        "worker 0=echo life $PS_ACCORDION_RESTART; echo reason $PS_ACCORDION_RESTART >&2; kill -9 $$",
        "worker 1=sleep 60",
        restarts=2,
        pause=0.01,
        grace=0.2,
        minimum=2,
    ).end()
    assert (code, output) == (137, "".join(f"[worker 0] {line}\n" for line in ("life", "life 1", "life 2")))
    assert error.count("starting it again") == 2
    lines = error.splitlines()
    assert lines[-3].startswith("---- worker 0 failed: exit code 137, killed by SIGKILL, after")
    assert lines[-2:] == ["reason 2", "ENDING 137 worker 0"]


@pytest.mark.parametrize("code", [3, 200])
def test_a_child_that_ends_by_itself_is_not_started_again(engine, code):
    """A script's own exit code ends the run at once."""
    process = engine(f"worker 0=exit {code}", "worker 1=sleep 60", restarts=3, grace=0.2)
    got, _, error = process.end()
    assert (got, "starting it again" in error) == (code, False)


def test_ctrl_c_during_a_pause_ends_at_once(engine):
    """Neither the pause of an hour nor the grace of one is waited for, and nobody has failed."""
    process = engine("coordinator=sleep 3600", "worker 0=kill -9 $$", restarts=3, pause=3600, grace=3600)
    process.error_with("starting it again in 3600 s")
    process.popen.send_signal(signal.SIGINT)
    code, _, error = process.end()
    assert code == 130
    assert "failed" not in error


def test_a_failure_during_a_pause_ends_the_run(engine, tmp_path):
    """Who waits is not started any more, and the one that failed is the cause."""
    os.mkfifo(tmp_path / "go")
    process = engine("worker 0=kill -9 $$", f"worker 1=read < {tmp_path / 'go'}; exit 3", restarts=3, pause=3600)
    process.error_with("starting it again in 3600 s")
    (tmp_path / "go").write_text("\n", encoding="utf-8")
    code, _, error = process.end()
    assert code == 3
    assert error.splitlines()[-1] == "ENDING 3 worker 1"


def test_a_role_killed_when_all_workers_are_done_is_a_failure(engine, tmp_path):
    """The run is ending: nobody is started again. The fifo closes when the launcher tidies up behind the worker."""
    os.mkfifo(tmp_path / "open")
    process = engine(
        f"coordinator=read < {tmp_path / 'open'}; kill -9 $$",
        f"worker 0=exec 3> {tmp_path / 'open'}; sleep 60 >/dev/null 2>&1 & exit 0",
        restarts=3,
    )
    code, _, error = process.end()
    assert (code, "starting it again" in error) == (137, False)
    assert error.splitlines()[-1] == "ENDING 137 coordinator"


def test_what_a_killed_child_left_running_ends_before_its_next_life(engine, ends_within):
    """Two lives of a child never run side by side."""
    process = engine(
        "worker 0=if [ $PS_ACCORDION_RESTART ]; then echo second; sleep 60; fi;"
        " sleep 60 >/dev/null 2>&1 & echo pid $!; kill -9 $$",
        restarts=1,
    )
    pid = int(process.line_with("pid").split()[-1])
    process.line_with("second")
    assert ends_within(pid, 0.0)
    process.popen.terminate()
    assert process.end()[0] == 143


def test_no_orphan_of_a_second_life_when_the_launcher_is_killed(engine, ends_within):
    """A child that was started again is bound to the launcher as the first one was, and so is what it starts."""
    process = engine(f"worker 0={DIES_ONCE} bash -c 'echo pid $$; sleep 60; true' & echo pid $$; wait", restarts=1)
    pids = [int(process.line_with("pid").split()[-1]) for _ in range(2)]
    os.kill(process.popen.pid, signal.SIGKILL)
    assert [ends_within(pid, 2.0) for pid in pids] == [True] * 2


def test_many_lives_leave_no_descriptors_behind(engine):
    """Streams of former lives are closed as they end, not when the run does."""
    count = "echo open $(ls /proc/$PPID/fd | wc -l); "
    process = engine(f"worker 0={count}[ ${{PS_ACCORDION_RESTART:-0}} = 20 ] || kill -9 $$", restarts=20, pause=0.05)
    code, output, _ = process.end()
    opened = [int(line.split()[-1]) for line in output.splitlines()]
    assert (code, len(opened)) == (0, 21)
    assert opened[-1] <= opened[1] + 2
