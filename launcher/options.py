"""The flags that set a job, and the settings that come out: config file < environment < flags."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ps_accordion import config, sources
from ps_accordion.config import Settings
from ps_accordion.errors import ConfigError
from ps_accordion.role import CONFIG_VARIABLE

__all__ = ["JobOptions", "plain_environment", "role_environment"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Flags that all commands with a job share. What is not given comes from the environment or the config file."""

    config: Path | None = None
    """TOML file with the job's settings (`ps-accordion config` shows all)."""
    workers: int | None = None
    """How many workers train."""
    servers: int | None = None
    """How many server processes aggregate."""
    shards_per_server: int | None = None
    """Shards, and so compute threads, in a server process."""
    codec: str | None = None
    """Codec of the tensors worth compressing: bf16, dense, dgc, eden, int, natural, onebit, powersgd, qsgd, quic_fl,
    random_block, random_k, signsgd, terngrad, threshold, topk."""
    light: float | None = None
    """Level in critical regimes, such as 0.04 of all elements."""
    heavy: float | None = None
    """Level elsewhere, such as 0.005."""
    policy: str | None = None
    """Who chooses between light and heavy: static, accordion."""
    run_directory: str | None = None
    """Where the run leaves its config, events and metrics."""
    trace: Annotated[bool | None, Parameter(negative=())] = None
    """Write what every thread does, and when; the picture is trace.json in the run directory."""
    seed: int | None = None
    """Seed of every random choice in compression."""
    set_: Annotated[list[str], Parameter(name="--set", negative=(), show_default=False, metavar="KEY=VALUE")] = field(
        default_factory=list
    )
    """Any other setting, as section.key=value; may be given again and again. Codecs by tensor:
    `'codec.tensors={"*.bias" = "dense", "head.*" = "int"}'`."""

    def overrides(self) -> dict[str, Any]:
        """Return the settings given as flags, by dotted name.

        Raises:
            ConfigError: A `--set` is not of the form section.key=value.
        """
        given = {dotted: getattr(self, name) for name, dotted in _DOTTED.items() if getattr(self, name) is not None}
        for text in self.set_:
            name, equals, value = text.partition("=")
            if not equals or not name:
                raise ConfigError(f"command line: --set expects section.key=value, such as codec.light=0.02; got {text!r}")
            given[name.strip()] = value.strip()
        return given

    def settings(self) -> Settings:
        """Resolve the job's settings from file, environment and flags.

        Raises:
            ConfigError: Something is unknown or not legal; the message names the source.
        """
        return config.load(self.file(), overrides=self.overrides())

    def file(self) -> Path | None:
        """Return the config file: the flag's, else the environment's."""
        if self.config is not None:
            return self.config
        named = os.environ.get(CONFIG_VARIABLE)
        return Path(named) if named else None


_DOTTED = {
    "workers": "workers.count",
    "servers": "servers.count",
    "shards_per_server": "servers.shards_per_server",
    "codec": "codec.name",
    "light": "codec.light",
    "heavy": "codec.heavy",
    "policy": "regime.policy",
    "run_directory": "run.directory",
    "trace": "run.trace",
    "seed": "seed",
}


def plain_environment() -> dict[str, str]:
    """Return this process's environment without any setting and without any process's place in a run."""
    ours = {sources.environment_name(name) for name in config.flatten(Settings())}
    place = ("CONFIG", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RESTART")
    ours |= {sources.ENVIRONMENT_PREFIX + name for name in place}
    return {name: value for name, value in os.environ.items() if name not in ours}


def role_environment(options: JobOptions) -> dict[str, str]:
    """Return the environment of one role on this machine: its settings travel as variables, in place of a file of ours."""
    environment = dict(os.environ)
    for dotted, value in options.overrides().items():
        environment[sources.environment_name(dotted)] = str(value)
    file = options.file()
    if file is not None:
        environment[CONFIG_VARIABLE] = str(file.absolute())
    return environment
