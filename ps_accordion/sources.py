"""Where settings are read from: a TOML file, environment variables, the command line. Each gives names, values, and where from.

A name is a setting's path, such as `servers.count`. One that is not known is refused with the place it stands in and the nearest
that is; whether a value is legal is not asked here.

The environment name of a setting is its path in capitals: `PS_ACCORDION_SERVERS_COUNT` is `[servers] count`.
Variables and flags only have text, which is read as what the setting is by default. In TOML a number can be written as one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ConfigError

__all__ = ["ENVIRONMENT_PREFIX", "Given", "environment_name", "from_environment", "from_flags", "from_toml", "nearest"]

ENVIRONMENT_PREFIX = "PS_ACCORDION_"

_ROLE_VARIABLES = frozenset(
    ENVIRONMENT_PREFIX + name
    for name in ("CONFIG", "CRASH_AT", "RESTART", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
)
"""Variables with our prefix that say which process this is, not how the job is set; and where tests let it die."""

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class Given(NamedTuple):
    """A value that somebody gave a setting.

    Attributes:
        name: The setting's path.
        value: The value.
        source: Where it stands, for messages.
    """

    name: str
    value: Any
    source: str


def environment_name(dotted: str) -> str:
    """Return the environment variable that sets `dotted`."""
    return ENVIRONMENT_PREFIX + dotted.replace(".", "_").upper()


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean ...?)` for the closest known word, or an empty string."""
    import difflib  # only when something is wrong

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def from_toml(file: Path, defaults: Mapping[str, Any]) -> Iterator[Given]:
    """Yield what a file gives.

    Args:
        file: The file.
        defaults: What each known setting is by default, by its path.

    Raises:
        ConfigError: There is no such file, it is no TOML, or it has a key that is no setting.
    """
    for name, value in _flattened(_read(file), list(defaults), str(file)):
        yield Given(name, value, str(file))


def from_environment(environment: Mapping[str, str], defaults: Mapping[str, Any]) -> Iterator[Given]:
    """Yield what variables give.

    Args:
        environment: All variables; those that do not start with `PS_ACCORDION_` are nobody's business here.
        defaults: What each known setting is by default, by its path.

    Raises:
        ConfigError: One that does is neither a setting nor one of `_ROLE_VARIABLES`.
    """
    known = {environment_name(name): name for name in defaults}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in _ROLE_VARIABLES:
            continue
        if variable not in known:
            raise ConfigError(
                f"environment variable {variable} is not a setting{nearest(variable, known)}; unset it, or correct its name"
            )
        name = known[variable]
        yield Given(name, _from_text(text, defaults[name]), f"environment variable {variable}")


def from_flags(flags: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[Given]:
    """Yield what flags give: text, or values of the setting's own type.

    Args:
        flags: Values by path.
        defaults: What each known setting is by default, by its path.

    Raises:
        ConfigError: There is no such setting.
    """
    for name, value in flags.items():
        if name not in defaults:
            raise ConfigError(f"command line: there is no setting {name!r}{nearest(name, defaults)}")
        yield Given(name, _from_text(value, defaults[name]) if isinstance(value, str) else value, "command line")


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {str(file)!r} does not exist (looked from {Path.cwd()})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"config file {str(file)!r} is not readable TOML: {error}") from None


def _flattened(table: dict[str, Any], leaves: list[str], file: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        dotted = prefix + name
        if dotted in leaves:
            yield dotted, value
        elif isinstance(value, dict) and any(leaf.startswith(dotted + ".") for leaf in leaves):
            yield from _flattened(value, leaves, file, dotted + ".")
        else:
            kind = "section" if isinstance(value, dict) else "key"
            known = {leaf.rpartition(".")[0] for leaf in leaves} - {""} if isinstance(value, dict) else leaves
            raise ConfigError(f"{file}: unknown {kind} {dotted!r}{nearest(dotted, known)}")


def _from_text(text: str, default: Any) -> Any:
    """Return `text` as the type of `default`, or as it is when it cannot be that; validation then says what was expected."""
    try:
        if isinstance(default, bool):
            return _WORDS[text.strip().lower()]
        if isinstance(default, int | float):
            return type(default)(text)
    except (KeyError, ValueError):
        pass
    return text
