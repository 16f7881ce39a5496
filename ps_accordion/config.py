"""Settings of a job: one frozen model, filled from TOML, then the environment, then the command line.

Later sources win (`sources.py`). Every role reads its settings here; what all roles must agree on (`Settings.terms`) is compared
when a process joins.

Types are strict: `count = "2"`, `count = 2.0` and `count = true` are refused in TOML.

`ps-accordion config` shows the text below each setting as its documentation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import xxhash
from msgspec import Meta

from .compression import CodecSettings
from .errors import ConfigError
from .sections import IllegalValue, Section, Written, explicit, flatten, kinds
from .sources import from_environment, from_flags, from_toml, nearest

__all__ = [
    "LARGEST_KEY",
    "CheckpointSettings",
    "CoordinatorSettings",
    "LayoutSettings",
    "RegimeSettings",
    "RunSettings",
    "ServerSettings",
    "Settings",
    "SkipSettings",
    "Timeouts",
    "WorkerSettings",
    "flatten",
    "job_of",
    "load",
    "render",
]

Seconds = Annotated[float, Meta(gt=0, le=86_400)]

MAX_SHARDS = 1024
"""Every view lists all shards with their addresses."""

LARGEST_KEY = 1 << 20
"""Elements of the largest key. `LayoutSettings` says why."""
LARGEST_SENT = 1 << 20
"""Bytes of the largest payload that a key of uncompressed gradients should have where these go over a network
(docs/decisions/0031-keys-of-what-is-not-compressed.md)."""
SMALLEST_KEY = 1024
"""Least that the largest key may be."""


class WorkerSettings(Section):
    """`[workers]`: the processes that train."""

    count: Annotated[int, Meta(ge=1, le=1024)] = 2
    """How many workers the run waits for, and whose gradients make a round."""
    minimum: Annotated[int, Meta(ge=1, le=1024)] = 1
    """The run goes on as long as so many workers are in it. With fewer it waits for others to come, up to `timeouts.join`."""
    maximum: Annotated[int, Meta(ge=0, le=1024)] = 0
    """So many workers may be in the run at once, when more come while it goes on; 0 means no more than `count`."""
    threads: Annotated[int, Meta(ge=0, le=256)] = 0
    """Threads a worker encodes and decodes with, each kept to a share of the cores; 0 takes two, or one where a worker has but
    one core to itself."""

    @property
    def places(self) -> int:
        """How many workers there is a place for: their ranks are below it."""
        return self.maximum or self.count


class ServerSettings(Section):
    """`[servers]`: the processes that aggregate."""

    count: Annotated[int, Meta(ge=1, le=1024)] = 2
    """How many server processes the run waits for."""
    shards_per_server: Annotated[int, Meta(ge=1, le=256)] = 1
    """Shards in a server process. A shard owns its keys and one compute thread, so this is also the thread count."""
    bind: str = "tcp://127.0.0.1:*"
    """Where a server listens; `*` as the port lets the system choose. Anything but loopback or ipc needs `insecure`."""
    state_directory: str = ""
    """Where servers keep what a restarted one goes on from: two residuals and a result of every key, as mapped files that are
    removed when the run is over. Empty: `state` in the run directory, or memory where there is none. `memory` keeps it in
    memory in any case; a server that dies then ends the run."""
    replay_rounds: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Rounds whose pushes workers keep, so that a server whose state is lost can fold them again and has every bit of its
    residuals back. Costs each worker the payloads of so many rounds, and servers a copy of their residuals every half so many
    rounds. 0: the residuals are then lost, and the ledger says so."""
    lane: Literal["auto", "off"] = "auto"
    """Whether payloads of `dense` at 32 and `bf16` are read from the sender's memory by processes of one host, rather than sent
    to them: where servers listen at ipc://, as they do under `launch`. off: all goes through sockets."""
    credit: Annotated[int, Meta(ge=0)] = 4 << 20
    """Bytes of pushes of a model that a worker has under way to a server at most; more waits until some have arrived, so that
    workers push in step over links that they share. Each worker's own counts. 0: no limit."""
    snapshot_directory: str = ""
    """Where servers put those copies, as large as the state: on another disk than the state, or on one that servers share. Empty:
    `snapshots` in the run directory; without one there are no copies, and only the first rounds of a run can be replayed."""


class CoordinatorSettings(Section):
    """`[coordinator]`: the process that admits members and broadcasts plans."""

    address: str = "tcp://127.0.0.1:5650"
    """Where the coordinator listens, and where everybody else looks for it."""


class RegimeSettings(Section):
    """`[regime]`: who decides between light and heavy, and when."""

    policy: str = "accordion"
    """static (always light) or accordion (light in critical regimes of a tensor)."""
    threshold: Annotated[float, Meta(gt=0)] = 0.5
    """Accordion's eta: a relative change of the gradient norm of at least this much is critical."""
    window: str = "1 epoch"
    """Length over which gradients are summed before their norm is taken: "N steps" or "N epochs"."""
    interval: Annotated[int, Meta(ge=1)] = 10
    """Windows between two decisions; a decision compares windows this far apart."""
    signal: Literal["mean", "released"] = "mean"
    """Whose norms count: the mean over all workers, or worker 0 alone as in the released code of the paper."""
    rate_drop: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    """A learning rate at or below this fraction of the rate at the last reset makes every tensor critical."""
    batch_multiplier: Annotated[int, Meta(ge=1, le=4096)] = 1
    """Batches that `session.accumulate` makes a step of where the whole model is not critical (accordion); 1 never grows the
    batch. The learning rate of such a step is multiplied by it."""


class LayoutSettings(Section):
    """`[layout]`: how tensors become keys. All roles must agree."""

    partition_elements: Annotated[int, Meta(ge=0, le=LARGEST_KEY)] = 0
    """Largest key, in elements, but for tensors that their codec needs whole (powersgd). 0 chooses: 1,048,576, so that what
    a key costs beside its elements is a small part; but where coordinator.address is not ipc:// as many as have a payload of
    1 MiB if `[codec]` is dense or bf16, 262,144 at 32 bits and 524,288 at 16, because smaller keys keep both ways of a link
    busy, which is what counts where nothing is compressed. A small model has smaller keys, an eighth of it each, but not below
    262,144 elements for that, so that servers have something to share."""

    def __post_init__(self) -> None:
        if 0 < self.partition_elements < SMALLEST_KEY:
            raise ConfigError(
                f"layout.partition_elements is {self.partition_elements}: expected {SMALLEST_KEY} or more, or 0 to have it chosen"
            )


class SkipSettings(Section):
    """`[skip]`: rounds in which some gradient was not finite."""

    limit: Annotated[int, Meta(ge=1)] = 20
    """The run stops after this many skipped rounds in a row."""


class Timeouts(Section):
    """`[timeouts]`: how long to wait for whom, in seconds."""

    join: Seconds = 120.0
    """How long a process waits for the coordinator's answer and for all others to join."""
    dead: Seconds = 10.0
    """A process that has sent nothing for this long is taken for dead."""
    stuck: Seconds = 30.0
    """A worker that computes for this long, and ten times as long as a step takes, while others wait for it is taken out of the
    run; `session.busy()` allows it more."""
    lost: Seconds = 60.0
    """A run goes on for this long without its coordinator."""
    server: Seconds = 60.0
    """A run waits this long for a server that died to be started again; then it ends. One that keeps its state in memory cannot
    come back: it has `timeouts.dead`."""
    heartbeat: Seconds = 0.4
    """How often every process tells the coordinator that it lives. One whose connection breaks has half as long again."""
    resend: Seconds = 1.0
    """A push without a result is asked after when this has passed, and its server has sent nothing for as long; doubles up to ten
    times as much."""
    grace: Seconds = 5.0
    """How long a process told to end may take before it is killed."""

    def __post_init__(self) -> None:
        if self.dead < 2 * self.heartbeat:
            raise ConfigError(
                f"timeouts.dead ({self.dead:g} s) must be at least twice timeouts.heartbeat ({self.heartbeat:g} s), "
                "or one late message kills a process that lives"
            )


class RunSettings(Section):
    """`[run]`: where the run leaves its records, and how often it starts a process again."""

    directory: str = ""
    """Run directory. Empty: `runs/<date>-<time>-<id>` under the current directory (launch), or none (single roles)."""
    record_gradients: bool = False
    """Write every raw gradient, payload and residual to the run directory, for an exact replay. Large."""
    trace: bool = False
    """Write what every thread of workers and servers does, and when, to the run directory. `launch --trace` makes `trace.json`
    of it, which chrome://tracing and ui.perfetto.dev open; `ps-accordion trace` does, of directories of several machines."""
    restarts: Annotated[int, Meta(ge=0)] = 3
    """How often `launch` starts a process again that was killed by a signal, as the kernel does when memory is short. Each
    process has this many, and has them back once it has lived for a minute; one that ends by itself is never started again."""


class CheckpointSettings(Section):
    """`[checkpoint]`: the state of the whole job on the disk, to go on from. All processes must see the same directory."""

    directory: str = ""
    """Where checkpoints are kept. Empty: `checkpoints` in the run directory."""
    every_steps: Annotated[int, Meta(ge=0)] = 0
    """`session.steps` makes one whenever so many steps have passed; 0 leaves it to `session.checkpoint()`."""
    keep: Annotated[int, Meta(ge=2, le=10_000)] = 2
    """How many are kept; the one before the last goes only when the last is whole on the disk."""
    resume: str = ""
    """A checkpoint to go on from. `ps-accordion launch --resume` sets it to the newest of a directory."""


class Settings(Section):
    """All settings of a job."""

    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    """Seed of every random choice in compression. Workers with another seed are refused."""
    insecure: bool = False
    """Allow listening beyond this machine without encryption."""
    workers: WorkerSettings = WorkerSettings()
    servers: ServerSettings = ServerSettings()
    coordinator: CoordinatorSettings = CoordinatorSettings()
    codec: CodecSettings = CodecSettings()
    regime: RegimeSettings = RegimeSettings()
    layout: LayoutSettings = LayoutSettings()
    skip: SkipSettings = SkipSettings()
    timeouts: Timeouts = Timeouts()
    run: RunSettings = RunSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    def __post_init__(self) -> None:
        if self.num_shards > MAX_SHARDS:
            raise ConfigError(
                f"servers.count x servers.shards_per_server is {self.num_shards}; expected at most {MAX_SHARDS} shards in a run"
            )

    def terms(self) -> dict[str, Any]:
        """Return what every process must agree on, by dotted name, as numbers and text: the coordinator compares it at join."""
        agreed = {"seed", "workers.count", "servers.count", "servers.shards_per_server", "servers.replay_rounds", "skip.limit"}
        agreed |= {"checkpoint.every_steps", "checkpoint.resume"}
        sections = ("codec.", "layout.", "regime.")
        terms = {
            name: str(value) if isinstance(value, Written) else value
            for name, value in flatten(self).items()
            if name in agreed or name.startswith(sections)
        }
        return terms | {"layout.partition_elements": self.partition_elements}

    def explicit_terms(self) -> dict[str, Any]:
        """Return those of `terms` that some source set: a joiner states them, and takes over the rest."""
        given = set(explicit(self))
        return {name: value for name, value in self.terms().items() if name in given}

    def with_terms(self, terms: Mapping[str, Any]) -> Settings:
        """Return these settings with the agreed terms of the job in place of their own.

        Args:
            terms: What the coordinator sent, by dotted name. Only names in `terms()` are taken: a peer has no say in where
                this process listens or writes.

        Raises:
            ConfigError: A name is not a term, or a value is not legal here.
        """
        known = self.terms()
        for name in terms:
            if name not in known:
                raise ConfigError(
                    f"the coordinator sent {name!r}, which is not a term of the job{nearest(name, known)}; "
                    "do all processes run the same version?"
                )
        return self.replaced(terms, source="the coordinator")

    def replaced(self, values: Mapping[str, Any], *, source: str) -> Settings:
        """Return these settings with other values, by dotted name; `source` is named if one of them is not legal."""
        return _settings(flatten(self) | dict(values), dict.fromkeys(values, source))

    @property
    def state_directory(self) -> str:
        """Where servers keep their state; empty for memory."""
        named = self.servers.state_directory
        if named == "memory" or not (named or self.run.directory):
            return ""
        return named or str(Path(self.run.directory) / "state")

    @property
    def snapshot_directory(self) -> str:
        """Where servers keep copies of their residuals; empty where no place is known, or nobody would replay from them."""
        named, run = self.servers.snapshot_directory, self.run.directory
        if not self.servers.replay_rounds or not (named or run):
            return ""
        return named or str(Path(run) / "snapshots")

    @property
    def checkpoint_directory(self) -> str:
        """Where checkpoints are kept; empty where no place is known."""
        run = self.run.directory
        return self.checkpoint.directory or (str(Path(run) / "checkpoints") if run else "")

    @property
    def partition_elements(self) -> int:
        """Largest key, in elements, as `layout.partition_elements` says or chooses it."""
        if self.layout.partition_elements or self.coordinator.address.startswith("ipc://"):
            return self.layout.partition_elements or LARGEST_KEY
        as_it_is, exact = self.codec.name in ("bf16", "dense"), self.codec.light == 32.0
        return min(LARGEST_KEY, LARGEST_SENT // (4 if as_it_is and exact else 2 if as_it_is else 1))

    @property
    def num_shards(self) -> int:
        """Shards of the whole run."""
        return self.servers.count * self.servers.shards_per_server


def job_of(settings: Settings) -> str:
    """Return what tells this job's files from those of others: a digest of its terms and its run directory."""
    directory = str(Path(settings.run.directory).absolute()) if settings.run.directory else ""
    text = json.dumps([settings.terms(), directory], sort_keys=True)
    return f"{xxhash.xxh3_64_intdigest(text.encode()):016x}"


def load(
    file: Path | str | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Resolve the settings of a job.

    Args:
        file: TOML file; None reads none.
        environment: Variables to read; None takes the process environment. Names that start with `PS_ACCORDION_` and are
            neither settings nor what the launcher tells a role are refused.
        overrides: Settings by dotted name, as flags give them: text, or values of the setting's own type.

    Raises:
        ConfigError: A key is unknown or a value is not legal. The message names the source and the nearest legal name.
    """
    defaults = flatten(Settings())
    given = [
        *(from_toml(Path(file), defaults) if file is not None else ()),
        *from_environment(os.environ if environment is None else environment, defaults),
        *from_flags(overrides or {}, defaults),
    ]
    return _settings({one.name: one.value for one in given}, {one.name: one.source for one in given})


def _settings(values: Mapping[str, Any], sources: Mapping[str, str]) -> Settings:
    """Return settings of values by dotted name; an error says where its value came from."""
    sections: dict[str, dict[str, Any]] = {}
    for dotted, value in values.items():
        section, _, name = dotted.rpartition(".")
        sections.setdefault(section, {})[name] = value
    whole = sections.pop("", {})
    for section, inside in sections.items():
        whole[section] = _made(kinds(Settings)[section], inside, sources, f"{section}.")
    settings: Settings = _made(Settings, whole, sources, "")
    return settings


def _made(kind: Any, values: dict[str, Any], sources: Mapping[str, str], prefix: str) -> Any:
    try:
        return kind(**values)
    except IllegalValue as error:
        name = prefix + error.name
        raise ConfigError(f"{sources.get(name, 'defaults')}: {prefix}{error}") from None
    except ConfigError as error:  # a rule between settings: its own message names them
        where = dict.fromkeys(source for name, source in sources.items() if name.startswith(prefix))
        raise ConfigError(f"{', '.join(where) or 'defaults'}: {error}") from None


def render(settings: Settings) -> str:
    """Return the settings as TOML that `load` reads back to an equal object."""
    import tomli_w  # only the launcher writes settings

    sections = msgspec.to_builtins(settings, enc_hook=str)
    del sections["codec"]["tensors"]
    # By hand: tomli_w writes a table a row.
    return "\n".join([tomli_w.dumps(sections), "[codec.tensors]", *settings.codec.tensors.toml(), ""])
