"""Everything dies, again and again, and freezes in between: the run goes on to its end with the bits of its own replay."""

import re
from collections import Counter

import pytest
from chaos import Chaos, Faults, events, replayed


def survive(directory, faults, *, workers, servers, seed):
    """Play a run with these faults, and check what it has left."""
    chaos = Chaos(directory, workers=workers, servers=servers, seed=seed)
    said = chaos.play(faults)
    finals = re.findall(r"FINAL (\d+) (\w+)", said)
    assert len(finals) == workers, said
    assert len(set(finals)) == 1, finals
    steps, digest = int(finals[0][0]), finals[0][1]
    replay, compared = replayed(chaos.run, steps)
    assert replay == digest
    signals = Counter((who.partition(" ")[0], what) for _, who, what in chaos.done)
    exits = Counter(
        event["name"].partition(" ")[0] for event in events(chaos.run, "events-launcher") if event["event"] == "restart"
    )
    kills = {"worker": faults.workers, "server": faults.servers, "coordinator": faults.coordinators}
    assert {kind: signals[kind, "SIGKILL"] for kind in kills} == kills
    assert exits == +Counter(kills)  # everything that ended had been killed, and came back
    assert sum(signals[kind, "SIGSTOP"] for kind in kills) == faults.stops
    print(f"{steps} rounds, {compared} results as replayed, {signals}")


@pytest.mark.timeout(300)
def test_a_dozen_kills_change_no_bit(tmp_path):
    """Three workers, two servers: half a minute of what the longer form does."""
    survive(tmp_path, Faults(workers=4, servers=5, coordinators=3, stops=1), workers=3, servers=2, seed=1)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_hundred_kills_and_twenty_stops_change_no_bit(tmp_path):
    """Four workers, two servers and the coordinator: nothing hangs, replicas are identical, and equal to the replay."""
    survive(tmp_path, Faults(workers=60, servers=25, coordinators=15, stops=20), workers=4, servers=2, seed=2)
