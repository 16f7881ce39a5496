"""Run seeds of the simulation: `python tests/simulation/simulate.py FIRST LAST [rough | POINT]`, the last one excluded.

Prints one line a failing seed, and at the end what has happened in all, as JSON. Without a third word odd seeds are rough.
With the name of a point (`roles.NAMED`) processes surely die there, beside what a seed draws; `each` does so for one point after
the other, a line of JSON each.
"""

import json
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from roles import NAMED, POINTS
from world import Faults, World

from ps_accordion.codecs import warm


def faults_of(seed: int, what: str) -> Faults | None:
    """Return what goes wrong in a run; None draws it."""
    if what in NAMED:
        return replace(Faults.drawn(random.Random(seed), POINTS), crash=what, spared=seed % 4)
    return Faults.rough() if seed % 2 or what == "rough" else None


def simulate(seeds: range, what: str) -> bool:
    """Run seeds, and print what has happened; return whether none broke a promise."""
    happened, failed = Counter(), 0
    for seed in seeds:
        try:
            happened += World(seed, faults_of(seed, what)).run()
        except Exception as error:  # whatever it is: the seed is what matters
            failed += 1
            print(f"seed {seed} {what}: {type(error).__name__}: {str(error)[:1000]}", file=sys.stderr, flush=True)
    print(json.dumps({"failed": failed, **happened} | ({"point": what} if what in NAMED else {})), flush=True)
    return not failed


def main() -> int:
    """Run them; return 1 if a seed broke a promise."""
    first, last, what = int(sys.argv[1]), int(sys.argv[2]), (*sys.argv[3:], "")[0]
    if what not in ("", "rough", "each", *NAMED):
        sys.exit(f"expected rough, each, or one of {', '.join(NAMED)}; got {what!r}")
    warm()
    done = [simulate(range(first, last), each) for each in (NAMED if what == "each" else [what])]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
