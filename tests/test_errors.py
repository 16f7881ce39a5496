"""The exception tree: what the drawing promises is what the classes are."""

import inspect
import re

import pytest

import ps_accordion
from ps_accordion import errors
from ps_accordion.errors import PsAccordionError

CLASSES = {name: getattr(errors, name) for name in errors.__all__}
DRAWN = re.findall(r"^ {4}([│├└─ ]*)(\w+)(?: .*?exit (\d+))?$", errors.__doc__ or "", re.MULTILINE)


def test_the_drawing_shows_every_class_once() -> None:
    """Whoever reads the top of the module has seen all."""
    assert sorted(name for _, name, _ in DRAWN) == sorted(CLASSES)


def test_the_drawing_shows_the_bases_and_exit_codes() -> None:
    """Depth in the drawing is inheritance; the number at the right is what a process returns."""
    parents: list[str] = []
    for lines, name, code in DRAWN:
        depth = len(lines) // 4
        assert CLASSES[name].__bases__[0].__name__ == (parents[depth - 1] if depth else "Exception")
        assert CLASSES[name].exit_code == int(code or 1)
        del parents[depth:]
        parents.append(name)


@pytest.mark.parametrize("name", CLASSES)
def test_no_error_exits_with_success(name: str) -> None:
    """Zero is success, 2 to 8 are ours; shells use 126 and above."""
    assert 1 <= CLASSES[name].exit_code < 126


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_can_be_caught_as_one(name: str) -> None:
    """One base for all; each is exported from the package and says in a sentence what it means."""
    assert issubclass(CLASSES[name], PsAccordionError)
    assert getattr(ps_accordion, name) is CLASSES[name]
    assert (inspect.getdoc(CLASSES[name]) or "").endswith(".")
    with pytest.raises(PsAccordionError, match=r"^what came$"):
        raise CLASSES[name]("what came")


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("LayoutError", ValueError),
        ("CodecError", ValueError),
        ("WireError", ValueError),
        ("UsageError", RuntimeError),
        ("Unreachable", TimeoutError),
        ("StorageError", OSError),
    ],
)
def test_a_mistake_is_what_python_calls_it(name: str, builtin: type[Exception]) -> None:
    """Code that knows nothing of us still catches the right kind."""
    assert issubclass(CLASSES[name], builtin)
