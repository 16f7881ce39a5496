"""Sections: what may stand in them, what is said when it may not, and what they know of their making."""

import copy
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta

from ps_accordion.errors import ConfigError
from ps_accordion.sections import IllegalValue, Section, explicit, flatten


class Inner(Section):
    count: Annotated[int, Meta(ge=1, le=4)] = 2
    share: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    rate: float = 1.0
    on: bool = False
    form: Literal["round", "square"] = "round"
    bits: Literal[16, 32] = 16
    name: str = ""


class Outer(Section):
    inner: Inner = Inner()
    seed: int = 0


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", 0, "a whole number at least 1 and at most 4"),
        ("count", True, "a whole number at least 1 and at most 4"),
        ("count", 2.0, "a whole number at least 1 and at most 4"),
        ("count", "2", "a whole number at least 1 and at most 4"),
        ("count", None, "a whole number at least 1 and at most 4"),
        ("count", 1 << 80, "a whole number at least 1 and at most 4"),
        ("share", 1, "a finite number above 0 and below 1"),
        ("share", False, "a finite number above 0 and below 1"),
        ("rate", float("inf"), "a finite number"),
        ("rate", float("nan"), "a finite number"),
        ("rate", 10**400, "a finite number"),
        ("on", 1, "true or false"),
        ("form", "oval", "'round' or 'square'"),
        ("form", 1, "'round' or 'square'"),
        ("bits", 8, "16 or 32"),
        ("bits", 16.0, "16 or 32"),
        ("name", b"x", "text"),
    ],
)
def test_a_value_that_is_not_legal_is_refused_when_the_section_is_made(name: str, value: Any, expected: str) -> None:
    """The message has the name, the value, what was expected and the default; bounds, types and finiteness all count."""
    with pytest.raises(IllegalValue) as caught:
        Inner(**{name: value})
    default = getattr(Inner(), name)
    assert (
        str(caught.value) == f"{name} = {value!r} is not legal: expected {expected}; correct it, or leave it out for {default!r}"
    )
    assert caught.value.name == name


def test_a_whole_number_becomes_the_float_that_is_expected() -> None:
    """What reads the setting finds the type that it was declared with."""
    assert type(Inner(rate=3).rate) is float


def test_a_section_within_a_section_must_be_one() -> None:
    """A table would slip past the checks of its fields."""
    inner: Any = {"count": 0}
    with pytest.raises(ConfigError, match="expected Inner"):
        Outer(inner=inner)


def test_an_unknown_name_is_a_programmer_s_error() -> None:
    """Names that people write are looked up before."""
    with pytest.raises(TypeError, match="conut"):
        Inner(**{"conut": 1})


def test_values_are_found_by_dotted_name() -> None:
    """A section's own name comes before those inside it."""
    assert flatten(Outer(inner=Inner(count=3), seed=1)) == {"seed": 1} | {
        f"inner.{name}": value for name, value in flatten(Inner(count=3)).items()
    }


def test_a_section_knows_what_it_was_given() -> None:
    """Given and left out differ even where the value is the same; equality does not see it, and a copy keeps it."""
    given = Outer(inner=Inner(count=2))
    assert set(explicit(given)) == {"inner.count"}
    assert set(explicit(Outer())) == set()
    assert given == Outer()
    assert copy.deepcopy(given) == given
    assert set(explicit(copy.deepcopy(given))) == {"inner.count"}
