"""Run seeds of the simulation: `python tests/simulation/simulate.py FIRST LAST [rough]`, the last one excluded.

Prints one line a failing seed, and at the end what has happened in all, as JSON. Without `rough` odd seeds are rough.
"""

import json
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from world import Faults, World

from ps_accordion.codecs import warm


def main() -> int:
    """Run them; return 1 if a seed broke a promise."""
    warm()
    happened, failed = Counter(), 0
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            faults = Faults.of_disks(seed) if "disks" in sys.argv else Faults.rough() if seed % 2 or "rough" in sys.argv else None
            happened += World(seed, faults).run()
        except Exception as error:  # whatever it is: the seed is what matters
            failed += 1
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:1000]}", file=sys.stderr, flush=True)
    print(json.dumps(happened))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
