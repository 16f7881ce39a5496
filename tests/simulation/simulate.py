"""Run seeds of the simulation: `python tests/simulation/simulate.py FIRST LAST [KIND [BUG...]]`, the last one excluded.

Prints one line a failing seed, and at the end what has happened in all, as JSON. Without a kind odd seeds are rough.

    rough   all are
    disks   servers lose their disks, too
    replay  the same, where workers keep the pushes of some rounds
    elastic workers leave and others come, too
    mixed   rough, and large tensors have codecs of their own: as many seeds as there are codecs have each of them twice
    POINT   processes surely die at that point (`roles.NAMED`), beside what a seed draws
    each    one point after the other, a line of JSON each

With names of planted bugs (`bugs.py`) it prints, of each, the seeds that pass without it and fail with it: those to pin. With
`every` it looks at all of them, until each has two.
"""

import gc
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from bugs import BUGS, planted
from roles import NAMED, POINTS
from world import TIME_LIMIT_S, Faults, World

from ps_accordion.codecs import warm
from ps_accordion.codecs.registry import DEFAULT
from ps_accordion.compression import LEVELS

CODECS = sorted(DEFAULT)
SHORT = {"dgc": (0.2, 0.02), "onebit": (64, 1024), "random_block": (0.2, 0.05), "topk": (0.2, 0.02)}
"""Levels for vectors of about a thousand elements, where a codec's own would be no smaller than dense, or next to nothing."""
ENOUGH = 2
"""Seeds that are looked for of each bug."""


def faults_of(seed: int, kind: str) -> Faults | None:
    """Return what goes wrong in a run; None draws it."""
    if kind in NAMED:
        return replace(Faults.drawn(random.Random(seed), POINTS), crash=kind, spared=seed % 4)
    if kind in ("disks", "replay"):
        return Faults.of_disks(seed)
    if kind == "elastic":
        return Faults.elastic(seed)
    return Faults.rough() if seed % 2 or kind in ("rough", "mixed") else None


def options_of(seed: int, kind: str) -> dict[str, Any]:
    """Return the settings of a run that are not those of all."""
    if kind == "replay":
        return {"servers_replay_rounds": 4}
    if kind == "mixed":
        turn, place = divmod(seed, len(CODECS))
        chosen = {"weight": CODECS[place], "deep": CODECS[(place + 1 + turn) % len(CODECS)]}
        levels = {name: SHORT.get(name, LEVELS[name]) for name in chosen.values()}
        rows = {at: {"codec": name, "light": levels[name][0], "heavy": levels[name][1]} for at, name in chosen.items()}
        return {"codec_tensors": rows}
    return {}


def world_of(seed: int, kind: str) -> World:
    """Return the run of a seed."""
    return World(seed, faults_of(seed, kind), options=options_of(seed, kind))


def passes(seed: int, kind: str, limit: float = TIME_LIMIT_S) -> bool:
    """Whether a seed breaks no promise, within so many seconds of its own time."""
    try:
        world = world_of(seed, kind)
        world.limit = limit
        world.run()
    except Exception:  # a check, or a role that breaks on what it gets
        return False
    return True


def catching(seeds: range, kind: str, bugs: list[str]) -> Iterator[tuple[str, int]]:
    """Yield (bug, seed) for seeds that pass without a bug and fail with it, until each bug has enough of them."""
    found = Counter()
    for seed in seeds:
        wanted = [bug for bug in bugs if found[bug] < ENOUGH]
        if not wanted or not passes(seed, kind):
            continue
        for bug in wanted:
            with planted(bug):
                caught = not passes(seed, kind)
            if caught:
                found[bug] += 1
                yield bug, seed


def simulate(seeds: range, kind: str) -> bool:
    """Run seeds, and print what has happened; return whether none broke a promise."""
    happened, failed = Counter(), 0
    for seed in seeds:
        try:
            happened += world_of(seed, kind).run()
        except Exception as error:  # whatever it is: the seed is what matters
            failed += 1
            print(f"seed {seed} {kind}: {type(error).__name__}: {str(error)[:1000]}", file=sys.stderr, flush=True)
    print(json.dumps({"failed": failed, **happened} | ({"point": kind} if kind in NAMED else {})), flush=True)
    return not failed


def main() -> int:
    """Run them; return 1 if a seed broke a promise, or a bug was not caught."""
    seeds, kind, bugs = range(int(sys.argv[1]), int(sys.argv[2])), (*sys.argv[3:], "")[0], sys.argv[4:]
    bugs = sorted(BUGS) if bugs == ["every"] else bugs
    if kind not in ("", "rough", "disks", "replay", "elastic", "mixed", "each", *NAMED):
        sys.exit(f"expected rough, disks, replay, elastic, mixed, each, or one of {', '.join(NAMED)}; got {kind!r}")
    if unknown := set(bugs) - BUGS.keys():
        sys.exit(f"expected planted bugs among {', '.join(sorted(BUGS))}; got {', '.join(sorted(unknown))}")
    warm()
    gc.freeze()  # what lives as long as this process is not looked through again and again
    if bugs:
        caught = set()
        for bug, seed in catching(seeds, kind, bugs):
            caught.add(bug)
            print(f"{bug}: {seed}", flush=True)
        return 0 if caught == set(bugs) else 1
    done = [simulate(seeds, each) for each in (NAMED if kind == "each" else [kind])]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
