"""Tensor tables of models that a job may train: two real ones, any from a file, and one that has only a size.

Shapes and order are those in which the published models register their parameters; names are ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LayoutError
from ..layout import DENSE_BELOW, MAX_DIMENSIONS, MAX_ELEMENTS, MAX_TENSORS, Tensor

__all__ = ["MODELS", "bert_base", "linear", "of_parameters", "read_table", "resnet50"]

WIDTH = 2048
"""Rows and columns of the matrices of a model of which only the size is known: wide layers, so that partitions are full."""


def resnet50() -> list[Tensor]:
    """Write down the trainable tensors of ResNet-50 (He et al., 2016), in the order in which they are registered."""

    def rows() -> Iterator[tuple[str, tuple[int, ...]]]:
        def convolution(name: str, out: int, into: int, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
            yield f"{name}.weight", (out, into, size, size)
            yield from ((f"{name}.norm.{part}", (out,)) for part in ("weight", "bias"))

        yield from convolution("stem", 64, 3, 7)
        into = 64
        for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
            for block in range(blocks):
                name = f"stage{stage}.{block}"
                yield from convolution(f"{name}.1", width, into, 1)
                yield from convolution(f"{name}.2", width, width, 3)
                yield from convolution(f"{name}.3", 4 * width, width, 1)
                if block == 0:
                    yield from convolution(f"{name}.shortcut", 4 * width, into, 1)
                into = 4 * width
        yield from (("head.weight", (1000, 2048)), ("head.bias", (1000,)))

    return [Tensor(name, shape, "float32") for name, shape in rows()]


def bert_base() -> list[Tensor]:
    """Write down the trainable tensors of BERT-base, uncased (Devlin et al., 2019), in the order of registration."""

    def rows() -> Iterator[tuple[str, tuple[int, ...]]]:
        def norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
            yield from ((f"{name}.{part}", (768,)) for part in ("weight", "bias"))

        def linear(name: str, out: int, into: int) -> Iterator[tuple[str, tuple[int, ...]]]:
            yield from ((f"{name}.weight", (out, into)), (f"{name}.bias", (out,)))

        for kind, count in (("words", 30522), ("positions", 512), ("types", 2)):
            yield f"embeddings.{kind}", (count, 768)
        yield from norm("embeddings.norm")
        for number in range(12):
            for part in ("query", "key", "value", "output"):
                yield from linear(f"layer{number}.attention.{part}", 768, 768)
            yield from norm(f"layer{number}.attention.norm")
            yield from linear(f"layer{number}.intermediate", 3072, 768)
            yield from linear(f"layer{number}.output", 768, 3072)
            yield from norm(f"layer{number}.norm")
        yield from linear("pooler", 768, 768)

    return [Tensor(name, shape, "float32") for name, shape in rows()]


def linear(layers: int, width: int) -> list[Tensor]:
    """Return the tensors of `layers` linear layers of `width` inputs and outputs, each with a bias: the benchmarks' network."""
    return [
        Tensor(f"{number}.{part}", shape, "float32")
        for number in range(layers)
        for part, shape in (("weight", (width, width)), ("bias", (width,)))
    ]


def of_parameters(count: int) -> list[Tensor]:
    """Return matrices of `WIDTH` columns with `count` elements together, and what is left as a vector.

    Raises:
        ConfigError: `count` is out of range.
    """
    if not DENSE_BELOW <= count <= MAX_ELEMENTS:
        raise ConfigError(f"command line: --parameters expects {DENSE_BELOW} to {MAX_ELEMENTS}, got {count}")
    full, rest = divmod(count, WIDTH * WIDTH)
    tensors = [Tensor(f"layer{number}", (WIDTH, WIDTH), "float32") for number in range(full)]
    if rest >= WIDTH:
        tensors.append(Tensor("head", (rest // WIDTH, WIDTH), "float32"))
    if rest % WIDTH:
        tensors.append(Tensor("rest", (rest % WIDTH,), "float32"))
    return tensors


def read_table(file: Path) -> list[Tensor]:
    """Read a tensor table: a JSON list of `[name, [dimension, ...]]`, in the order of `model.named_parameters()`.

    Raises:
        ConfigError: There is no such file, or it holds something else.
    """
    form = 'a JSON list of [name, [dimension, ...]], such as [["fc.weight", [10, 128]], ["fc.bias", [10]]]'
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(MODELS)
        raise ConfigError(f"--model {str(file)!r}: {error.strerror}; expected {known}, or a file with {form}") from None
    except ValueError as error:
        raise ConfigError(f"--model {str(file)!r} is no JSON ({error}); expected {form}") from None
    if not isinstance(rows, list) or not rows or len(rows) > MAX_TENSORS:
        raise ConfigError(f"--model {str(file)!r}: expected {form}, of 1 to {MAX_TENSORS} rows")
    tensors = []
    for number, row in enumerate(rows):
        try:
            tensors.append(_tensor(row))
        except (LayoutError, TypeError, ValueError):
            raise ConfigError(f"--model {str(file)!r}: row {number} is {json.dumps(row)[:80]}; expected {form}") from None
    return tensors


def _tensor(row: Any) -> Tensor:
    name, shape = row
    if not isinstance(name, str) or not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise TypeError("expected a name and a shape")
    if any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in shape):
        raise ValueError("expected dimensions of at least 1")
    return Tensor(name, tuple(shape), "float32")


MODELS: dict[str, Callable[[], list[Tensor]]] = {"resnet50": resnet50, "bert-base": bert_base}
"""Makes the table of each model that is known by name."""
