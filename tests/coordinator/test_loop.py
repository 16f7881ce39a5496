"""The coordinator's loop on a real socket: it listens, answers, ends with the right code, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from machines import settings_of
from typing_extensions import Buffer

from ps_accordion import config
from ps_accordion.config import Settings
from ps_accordion.coordinator import loop
from ps_accordion.coordinator.log import Log
from ps_accordion.errors import ConfigError, RunAborted, StorageError
from ps_accordion.telemetry.events import JsonLines
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Peer, Record, Send
from ps_accordion.wire.transport import Transport

PATIENCE = 20.0


def asked(link: Transport, message: m.Message, until: type[m.Message]) -> m.Message:
    """Repeat a message to a coordinator until an answer of this kind comes."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        link.send("coordinator", message)
        for arrival in link.poll(0.05):
            if isinstance(arrival.message, until):
                return arrival.message
    raise AssertionError(f"no {until.__name__}")


class Running:
    """A coordinator on a thread, and one connection to it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.code: int | None = None
        self.address = ""
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._listening.wait(PATIENCE)
        self.link = Transport()
        self.link.connect("coordinator", self.address)

    def _run(self) -> None:
        def listening(address: str) -> None:
            self.address = address
            self._listening.set()

        self.code = loop.run(self.settings, listening=listening)

    def say(self, message: m.Message, until: type[m.Message]) -> m.Message:
        """Repeat a message until an answer of this kind comes."""
        return asked(self.link, message, until)

    def end(self) -> int | None:
        """Wait for the coordinator to end; return its code."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self.link.close()
        return self.code


@pytest.fixture
def small(tmp_path: Path) -> Settings:
    place = {"coordinator_address": "tcp://127.0.0.1:*", "run_directory": str(tmp_path)}
    return settings_of(workers_count=1, timeouts_grace=0.3, regime_policy="static", **place)


def events(settings: Settings) -> list[dict]:
    file = Path(settings.run.directory, "events-coordinator.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def joined(run: Running) -> m.Welcome:
    """Let one worker and one server join."""
    welcome = run.say(m.Join("t", -1, {}), m.Welcome)
    assert isinstance(welcome, m.Welcome)
    run.say(m.ServerAlive(0, "tcp://127.0.0.1:1", [(0, 5)], [], -1), m.View)
    return welcome


def test_a_run_that_ends_well_returns_0(small: Settings) -> None:
    """With the goodbyes of all it ends at once, and its log tells the story in order."""
    run = Running(small)
    welcome = joined(run)
    run.say(m.Leave(welcome.slot, welcome.incarnation, "", 0), m.Ended)
    for name in ("worker 0", "server 0"):
        run.link.send("coordinator", m.Bye(name))
    assert run.end() == 0
    assert [event["event"] for event in events(small)] == ["start", "join", "server", "view", "end"]


def test_a_run_that_fails_returns_its_code_after_the_grace(small: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    """Nobody says goodbye; the reason stands in the log and on the screen."""
    run = Running(small)
    welcome = joined(run)
    abort = run.say(m.Leave(welcome.slot, welcome.incarnation, "it broke", 1), m.Abort)
    assert abort == m.Abort("worker 0", "it broke")
    assert run.end() == RunAborted.exit_code
    assert events(small)[-1] | {"event": "error", "culprit": "worker 0", "reason": "it broke"} == events(small)[-1]
    assert "coordinator: it broke" in capfd.readouterr().err


def test_garbage_is_answered_and_logged(small: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    """A process of another protocol version learns both versions, and a refused one why; the run goes on."""
    run = Running(small)
    joined(run)
    deadline = time.monotonic() + PATIENCE
    answers: list[m.Message | None] = []
    while not any(isinstance(answer, m.Refused) for answer in answers):
        assert time.monotonic() < deadline
        run.link.send_frames("coordinator", [b"PSA\x09" + bytes(20)])
        answers += [arrival.message for arrival in run.link.poll(0.05)]
    assert any(isinstance(answer, m.Refused) and "version 9 from there, 2 here" in answer.reason for answer in answers)
    refused = run.say(m.Join("late", 0, {}), m.Refused)
    assert isinstance(refused, m.Refused)
    run.say(m.Leave(0, 1, "", 0), m.Ended)
    assert run.end() == 0
    assert {"garbage", "refused"} <= {event["event"] for event in events(small)}
    assert "coordinator: " in capfd.readouterr().err


def test_it_does_not_start_where_it_cannot_or_must_not_listen(small: Settings) -> None:
    """A port in use, an address that others can reach, and settings that cannot work: refused before anything is awaited."""
    holder = Transport()
    address = holder.listen("tcp://127.0.0.1:*")
    for options, says in (
        ({"coordinator_address": address}, "stop the other process"),
        ({"coordinator_address": "tcp://0.0.0.0:*"}, "--insecure"),
        ({"coordinator_address": "tcp://127.0.0.1:*", "regime_policy": "acordion"}, "accordion"),
    ):
        with pytest.raises(ConfigError, match=says):
            loop.run(settings_of(**options))
    holder.close()


def test_a_killed_coordinator_goes_on_at_the_same_socket_path(tmp_path: Path) -> None:
    """SIGKILL leaves the socket's file behind; the next one binds it, has the log, and knows who was let in; links find it."""
    address = f"ipc://{tmp_path}/c"
    settings = settings_of(
        workers_count=1, timeouts_grace=0.3, regime_policy="static", coordinator_address=address, run_directory=str(tmp_path)
    )
    file = tmp_path / "config.toml"
    file.write_text(config.render(settings))
    link = Transport()
    link.connect("coordinator", address)
    welcomes = []
    for life in range(2):
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ps_accordion.coordinator"], env=os.environ | {"PS_ACCORDION_CONFIG": str(file)}
        )
        try:
            welcomes.append(asked(link, m.Join("t", -1, {}), m.Welcome))
            if life:
                asked(link, m.ServerAlive(0, "tcp://127.0.0.1:1", [(0, 5)], [], -1), m.View)
                asked(link, m.Leave(0, 1, "", 0), m.Ended)
                assert process.wait(PATIENCE) == 0
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE)
    link.close()
    assert welcomes[0] == welcomes[1]
    assert [event["term"] for event in events(settings) if event["event"] == "start"] == [1, 2]


def test_nothing_is_sent_that_could_not_be_recorded(tmp_path: Path) -> None:
    """The actions in front of the record are carried out, those behind it are not."""
    sent: list[m.Message] = []

    class Sockets(Transport):
        def send(self, peer: Peer, message: m.Message, payload: Sequence[Buffer] = ()) -> None:
            sent.append(message)

    log = Log.open(tmp_path, job="j")
    log.close()
    sockets = Sockets()
    actions = [Send((b"a",), m.Pulse()), Record({"what": "ending"}), Send((b"a",), m.Ended())]
    with pytest.raises(StorageError, match="is closed"):
        loop.carry_out(actions, sockets, JsonLines(None), log)
    sockets.close()
    assert sent == [m.Pulse()]


def test_a_log_that_fails_ends_the_run_for_all(small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is connected is told why; the process ends with the storage error."""
    sent: list[m.Message] = []
    threads: list[threading.Thread] = []
    over = threading.Event()

    class Sockets(Transport):
        def send(self, peer: Peer, message: m.Message, payload: Sequence[Buffer] = ()) -> None:
            sent.append(message)
            super().send(peer, message, payload)

    def full(log: Log, record: object) -> None:
        raise StorageError("no room")

    def listening(address: str) -> None:
        def knock() -> None:
            link = Transport()
            link.connect("coordinator", address)
            while not over.is_set():
                link.send("coordinator", m.Join("t", -1, {}))
                link.poll(0.05)
            link.close()

        threads.append(threading.Thread(target=knock))
        threads[0].start()

    monkeypatch.setattr(Log, "append", full)
    with pytest.raises(StorageError, match="no room"):
        loop.run(small, transport=Sockets(), listening=listening)
    over.set()
    threads[0].join()
    assert sent == [m.Abort("coordinator", "StorageError: no room")]
