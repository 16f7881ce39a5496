"""The `ps-accordion` command. Commands are loaded when they are called, so that `--help` needs no numeric library."""

from __future__ import annotations

import os
import signal
import sys

from cyclopts import App, CycloptsError

from ps_accordion import __version__
from ps_accordion.errors import ConfigError, PsAccordionError

__all__ = ["app", "main"]

_COMMANDS = "ps_accordion.launcher.commands"

app = App(
    name="ps-accordion",
    help="Train PyTorch models over slow networks: gradients go compressed through parameter servers, both ways.",
    help_epilogue="Start here: ps-accordion demo",
    version=__version__,
)


def _add(parent: App, name: str, target: str, summary: str, example: str) -> None:
    parent.command(f"{_COMMANDS}.{target}", name=name, help=summary, help_epilogue=f"Example: {example}")


_add(
    app,
    "launch",
    "launch:launch",
    "Run a training job on this machine: a coordinator, servers, and your command once a worker.",
    "ps-accordion launch --workers 2 --servers 2 -- python train.py --epochs 3",
)
_add(
    app,
    "coordinator",
    "roles:coordinator",
    "Run one coordinator, for a job over several machines.",
    "ps-accordion coordinator --config job.toml --set coordinator.address=tcp://10.0.0.5:5650 --insecure",
)
_add(
    app,
    "server",
    "roles:server",
    "Run one server, for a job over several machines.",
    "ps-accordion server --number 0 --config job.toml --set servers.bind=tcp://10.0.0.6:* --insecure",
)
_add(
    app,
    "worker",
    "roles:worker",
    "Run one worker, for a job over several machines.",
    "ps-accordion worker --rank 0 --config job.toml -- python train.py",
)
_add(
    app,
    "demo",
    "demo:demo",
    "Train on handwritten digits, and compare with dense training on one process.",
    "ps-accordion demo --json demo.json",
)
_add(
    app,
    "config",
    "config:show",
    "Show all settings, resolved from file, environment and flags, with what they mean.",
    "ps-accordion config --light 0.02 > job.toml",
)
_add(
    app,
    "trace",
    "trace:trace",
    "Draw what all processes of a run did and when, of a run that was made with --trace.",
    "ps-accordion trace runs/20260101-120000-ab12 --out trace.json",
)
_add(
    app,
    "plan",
    "plan:plan",
    "Predict step time, processor time and memory of a job, and recommend how many servers it wants.",
    "ps-accordion plan --workers 64 --bandwidth 10Gbit --model resnet50 --compute 150ms",
)
bench = App(name="bench", help="Measure this machine.", help_epilogue="Example: ps-accordion bench codecs")
_add(
    bench,
    "pushpull",
    "bench:pushpull",
    "Time push_pull of one large tensor beside gloo all_reduce of the same tensor.",
    "ps-accordion bench pushpull --cases topk:0.01,dense:32 --json pushpull.json",
)
_add(
    bench,
    "step",
    "bench:step",
    "Time a whole training step beside DistributedDataParallel, and beside a model that shares nothing.",
    "ps-accordion bench step --cases topk:0.01 --baselines ddp,ddp_fp16 --json step.json",
)
_add(
    bench,
    "codecs",
    "bench_codecs:codecs",
    "Time what codecs do, as multiples of a plain copy, and say what they lose on six kinds of vectors.",
    "ps-accordion bench codecs --only topk:0.01,dense --elements 262144 --json codecs.json",
)
app.command(bench)


def main() -> None:
    """Run the command line and exit with its code: 0 only on success; docs/exit-codes.md lists the others."""
    try:
        code = app(exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        code = _explain(f"{error} See ps-accordion --help.", ConfigError.exit_code)
    except PsAccordionError as error:
        code = _explain(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read our output has gone; without this, Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code or 0)


def _explain(text: str, code: int) -> int:
    print(f"ps-accordion: {text}", file=sys.stderr, flush=True)
    return code
