"""Kills a process again and again while it works on a shard's memory, and looks at what the next one finds.

Run with a directory, a number of kills and a seed; prints one line of JSON. Each process checks what it finds against counters in
memory that the processes share, opens, stores and closes in a loop, and never ends by itself unless a check fails.
"""

import json
import mmap
import os
import random
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from ps_accordion.server.durable import KeySize, ShardStore

TABLES = {0: b"first", 7: b"second" * 100}
SIZES = {0: [KeySize(1000, 4000, 64), KeySize(33, 100)], 7: [KeySize(20_000, 40_000, 1000)]}
KEYS = [(layout, key) for layout in SIZES for key in range(len(SIZES[layout]))]
PHASES = ("opening", "storing", "closing")
SLOWEST = 0.02
"""Seconds within which a kill falls, counted from a successful check."""


class Shared:
    """Counters that outlive a process: rounds finished of each key, of the record; the boot; checks, rounds, the phase."""

    def __init__(self):
        self.numbers = np.frombuffer(mmap.mmap(-1, 4096), np.int64)
        self.finished = self.numbers[:8]
        self.boot, self.checks, self.rounds, self.phase = (self.numbers[place : place + 1] for place in range(8, 12))


def contents(number, size):
    """Return header, frames and plan of a round: lengths vary with it, and every byte says which it is."""
    stamp = struct.pack("<Q", number)
    payload = stamp * (number % (size.payload // 8 + 1))
    cut = number * 7 % (len(payload) + 1)
    return stamp * (1 + number % 30), [payload[:cut], payload[cut:]], stamp * (number % (size.plan // 8 + 1))


def check(store, shared):
    """Compare what is stored with what was finished: that, or the round that was being stored."""
    assert not store.lost, store.lost
    if shared.boot[0] == 0:
        shared.boot[0] = store.boot
    assert store.boot == shared.boot[0]
    halves = {}
    for place, (layout, key) in enumerate(KEYS):
        finished = shared.finished[place]
        assert layout in store.layouts or not finished
        keystore = store.add_layout(layout, TABLES[layout], SIZES[layout])[key]
        stored = keystore.load()
        number = 0 if stored is None else struct.unpack_from("<Q", stored.header)[0]
        assert finished <= number <= finished + 1, (layout, key, finished, number)
        if stored is not None:
            assert (stored.header, list(stored.frames), stored.plan) == contents(number, SIZES[layout][key])
            halves[layout, key] = keystore.halves[number % 2]
            assert (halves[layout, key] == number).all()
        shared.finished[place] = number
    number = struct.unpack("<Q", store.record[:8])[0] if store.record else 0
    assert shared.finished[7] <= number <= shared.finished[7] + 1
    assert store.record == struct.pack("<Q", number) * (number % 500 + 1) * (number > 0)
    assert store.layouts == TABLES
    shared.finished[7] = number
    shared.checks[0] += 1


def work(directory, shared, seed, report):
    """Open, store and close until somebody kills us."""
    chance = random.Random(seed)
    while True:
        shared.phase[0] = 0
        with ShardStore.open(directory, shard=3, job="job") as store:
            check(store, shared)
            os.write(report, b".")
            shared.phase[0] = 1
            for _ in range(chance.randrange(300)):
                place = chance.randrange(len(KEYS))
                layout, key = KEYS[place]
                keystore = store.add_layout(layout, TABLES[layout], SIZES[layout])[key]
                number = int(shared.finished[place]) + 1
                keystore.halves[number % 2].fill(number)
                keystore.store(*contents(number, SIZES[layout][key]))
                shared.finished[place] = number
                if chance.random() < 0.3:
                    number = int(shared.finished[7]) + 1
                    store.write_record(struct.pack("<Q", number) * (number % 500 + 1))
                    shared.finished[7] = number
                shared.rounds[0] += 1
            shared.phase[0] = 2


def main(directory, kills, seed):
    """Kill that many processes and print what happened."""
    shared = Shared()
    chance = random.Random(seed)
    hit = dict.fromkeys(PHASES, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    for number in range(kills):
        there, report = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                work(directory, shared, chance.random(), report)
            finally:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        os.close(report)
        # Every fourth may be killed before it has checked anything, so that kills fall into the check of what a kill has left.
        if number % 4:
            os.read(there, 1)
        with suppress(InterruptedError):
            signal.sigtimedwait([signal.SIGCHLD], chance.random() * SLOWEST)
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        os.close(there)
        signal.sigtimedwait([signal.SIGCHLD], 0)  # taken, or the next wait would end at once
        if not os.WIFSIGNALED(status):
            sys.exit(f"process {number} of seed {seed} ended by itself")
        hit[PHASES[shared.phase[0]]] += 1
    with ShardStore.open(directory, shard=3, job="job") as store:
        check(store, shared)
    print(json.dumps({"checks": int(shared.checks[0]), "rounds": int(shared.rounds[0]), "kills": hit}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
