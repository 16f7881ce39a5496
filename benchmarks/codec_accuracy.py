"""Does training come to the same accuracy with every codec, at the level that it has where a job sets none?

    python -m benchmarks.codec_accuracy [--seeds 3] [--epochs 24] [--only topk,onebit] [--heavy] [--json FILE]

Two workers and two servers train the network of `ps-accordion demo` on scikit-learn's handwritten digits (151,306 parameters,
batch 64, SGD with momentum), once with every codec at one fixed level, both ways; and one process alone, on the joined batch,
without compression. The rates were chosen for that one, and nothing is tuned for any codec; but dgc brings its own momentum, so
the optimizer has none there. Test accuracy after the last epoch, of 360 images: 0.28 points are one image.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ps_accordion.codecs import registry
from ps_accordion.launcher.machine import machine
from ps_accordion.selection import levels_of

ALONE = "alone"
PATIENCE_S = 300


def main() -> None:
    """Train with every codec and seed, and print what came out beside training alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--epochs", type=int, default=24, help="passes over the 1,437 training images (default: 24)")
    parser.add_argument("--only", default="", help="codecs to train with, separated by commas (default: all)")
    parser.add_argument("--heavy", action="store_true", help="at the heavy level, instead of the light one")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    options = parser.parse_args()
    codecs = options.only.split(",") if options.only else registry.names()
    print(json.dumps(machine()))
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for codec in (ALONE, *codecs):
            row = trained(codec, seed, epochs=options.epochs, heavy=options.heavy)
            rows.append(row)
            print(f"seed {seed}  {codec:14} {row['level']:<10.4g} {row['accuracy']:.2%}", flush=True)
    show(rows, codecs)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")


def trained(codec: str, seed: int, *, epochs: int = 24, heavy: bool = False) -> dict[str, Any]:
    """Train once.

    Args:
        codec: Its name, or `ALONE`.
        seed: Of the network, the data order and the compression.
        epochs: Passes over the training images.
        heavy: Whether at the heavy level.

    Returns:
        case, level, seed, accuracy (0 to 1), and mb_a_worker: sent and received in all steps.

    Raises:
        SystemExit: It failed; the message has what was printed.
    """
    level = 0.0 if codec == ALONE else levels_of(codec)[heavy]
    with tempfile.TemporaryDirectory(prefix="psa-codec-accuracy-") as name:
        results = Path(name, "result-{rank}.json")
        script = [sys.executable, "-P", "-m", "ps_accordion.worker.demo", "--epochs", str(epochs), "--seed", str(seed)]
        script += ["--result", str(results), *(["--momentum", "0"] if codec == "dgc" else [])]
        if codec == ALONE:
            command = [*script, "--dense"]
        else:
            command = [sys.executable, "-P", "-m", "ps_accordion.launcher", "launch", "--workers", "2", "--servers", "2"]
            command += ["--run-directory", str(Path(name, "run")), "--progress", "none", "--codec", codec]
            sets = {"codec.light": level, "codec.heavy": level, "regime.policy": "static", "seed": seed}
            command += [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
            command += ["--", *script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=os.environ, check=False)
        if done.returncode:
            raise SystemExit(f"{codec}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}")
        result = json.loads(Path(str(results).replace("{rank}", "0")).read_text(encoding="utf-8"))
    moved = result["push_bytes"] + result["pull_bytes"]
    return {"case": codec, "level": level, "seed": seed, "accuracy": result["accuracy"], "mb_a_worker": moved / 1e6}


def show(rows: list[dict[str, Any]], codecs: list[str]) -> None:
    """Print a table of means over seeds."""
    accuracies = {case: [row["accuracy"] for row in rows if row["case"] == case] for case in (ALONE, *codecs)}
    alone = statistics.mean(accuracies[ALONE])
    print(f"\nmeans over {len(accuracies[ALONE])} seeds; alone {alone:.2%}")
    print(f"{'':14} {'level':>10} {'accuracy':>9} {'least':>8} {'points':>7} {'MB a worker':>12}")
    for codec in codecs:
        mine = [row for row in rows if row["case"] == codec]
        mean = statistics.mean(accuracies[codec])
        bytes_ = statistics.mean(row["mb_a_worker"] for row in mine)
        least, points = min(accuracies[codec]), 100 * (mean - alone)
        print(f"{codec:14} {mine[0]['level']:>10.4g} {mean:>9.2%} {least:>8.2%} {points:>+7.2f} {bytes_:>12.2f}")


if __name__ == "__main__":
    main()
