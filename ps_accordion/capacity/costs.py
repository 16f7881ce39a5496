"""What the work of a job costs, in processor seconds, as `ps-accordion bench` has measured it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..regimes.base import Choice

__all__ = ["Carry", "Costs", "Handling", "Work", "works_of"]

_MEMBERS = 8
"""Members in the rows of `bench codecs` that stand for a whole round at a server: `answer8`, `linear_sum8`."""


class Work(NamedTuple):
    """What a codec at a level costs, in seconds an element.

    Attributes:
        encode: A worker's encoding, with feedback.
        decode: A worker's decoding.
        answer: What a shard does with a round of `_MEMBERS` members: sum, and encode the sum.
        member: What one member more adds to that.
    """

    encode: float
    decode: float
    answer: float
    member: float

    def answered(self, members: int) -> float:
        """Return the seconds an element of a shard's round of so many members."""
        return max(self.answer + (members - _MEMBERS) * self.member, members * self.member)


class Carry(NamedTuple):
    """What a thread spends on messages that pass it.

    Attributes:
        message: Seconds each.
        byte: Seconds a byte on top.
    """

    message: float = 0.0
    byte: float = 0.0

    def of(self, nbytes: float) -> float:
        """Return the seconds that a message of so many bytes takes."""
        return self.message + self.byte * nbytes


class Handling(NamedTuple):
    """What a process spends on a key beside the kernels of its codec.

    Attributes:
        task: Seconds of a codec thread, or a shard's, on a key and round: Python, accounts, caches that have gone cold.
        sockets: Of our own thread of the sockets, a message.
        zeromq: Of ZeroMQ's thread, with what the kernel does in it, a message.
    """

    task: float = 0.0
    sockets: Carry = Carry()
    zeromq: Carry = Carry()


@dataclass(frozen=True)
class Costs:
    """All that a simulation has to know of the machines.

    Attributes:
        works: By codec and level.
        copy: Seconds an element of a copy in memory: every gradient is copied into its bucket once.
        worker: What a worker spends beside.
        server: What a server spends beside.
    """

    works: Mapping[Choice, Work]
    copy: float
    worker: Handling
    server: Handling

    def work(self, choice: Choice) -> Work:
        """Return what a codec costs at a level.

        Raises:
            ConfigError: It was not measured; says how to.
        """
        if choice not in self.works:
            case = f"{choice.codec}:{choice.level:g}"
            raise ConfigError(
                f"there are no coefficients of {case}; measure them: ps-accordion bench codecs --only {case} --elements 1048576 "
                "--json FILE"
            )
        return self.works[choice]


def works_of(rows: Iterable[Mapping[str, Any]], *, source: str) -> tuple[dict[Choice, Work], float]:
    """Return what codecs cost, and the seconds an element of a copy, from the rows of `bench codecs`.

    Args:
        rows: As in its JSON, and of op `copy`. Rows of other benches are passed over.
        source: Where they come from, for messages.

    Raises:
        ConfigError: A row lacks what it should have, or a codec lacks an operation.
    """
    times: dict[Choice, dict[str, float]] = {}
    copies: list[float] = []
    sizes: list[int] = []
    for row in rows:
        if "op" not in row:
            continue
        try:
            each = float(row["ms"]) / 1e3 / int(row["n"])
            copies.append(each if row["op"] == "copy" else each / float(row["vs_memcpy"]))
            sizes.append(int(row["n"]))
            if row["op"] == "copy":
                continue
            times.setdefault(Choice(str(row["codec"]), float(row["level"])), {})[str(row["op"])] = each
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            raise ConfigError(f"{source}: expected rows as bench codecs --json writes them, got {dict(row)!r}"[:400]) from None
    if not all(math.isfinite(each) and each > 0 for each in copies):
        raise ConfigError(f"{source}: expected times above zero in the rows of bench codecs")
    works = {choice: _work(choice, of, source) for choice, of in times.items()}
    # Gradients of a whole step are in no cache: the largest vector is most like them.
    large = sorted(copy for copy, size in zip(copies, sizes, strict=True) if size == max(sizes))
    return works, large[len(large) // 2] if large else 0.0


def _work(choice: Choice, times: Mapping[str, float], source: str) -> Work:
    try:
        encode, decode = times["encode_feedback"], times["decode"]
        if "encode_turned" in times:  # whole tensors: each round encodes the other half
            encode = (encode + times["encode_turned"]) / 2
        if f"linear_sum{_MEMBERS}" in times:  # never decoded
            answer = times[f"linear_sum{_MEMBERS}"]
            return Work(encode, decode, answer, answer / _MEMBERS)
        member = max(0.0, (times[f"fold{_MEMBERS}"] - times["fold2"]) / (_MEMBERS - 2))
        return Work(encode, decode, times[f"answer{_MEMBERS}"], member)
    except KeyError as error:
        raise ConfigError(
            f"{source}: {choice.codec}:{choice.level:g} has no row {error}; write the file anew with bench codecs --json"
        ) from None
