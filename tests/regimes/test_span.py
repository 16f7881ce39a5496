"""Lengths of windows as the configuration writes them."""

import pytest

from ps_accordion.errors import ConfigError
from ps_accordion.regimes import Span, parse_span


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("1 epoch", Span(1, "epoch")),
        ("3 epochs", Span(3, "epoch")),
        ("100 steps", Span(100, "step")),
        (" 1  step ", Span(1, "step")),
        ("1000000000 steps", Span(1_000_000_000, "step")),
    ],
)
def test_steps_and_epochs_are_read(text, span):
    """Number, space, unit; and what is written is read back."""
    assert span == parse_span(text)
    assert span == parse_span(str(span))


@pytest.mark.parametrize(
    "text", ["", "epoch", "0 steps", "-1 steps", "1.5 epochs", "10", "10 rounds", "1000000001 steps", "10steps", "٣ steps"]
)
def test_anything_else_is_refused_with_what_is_legal(text):
    """The message shows what came and both legal forms."""
    with pytest.raises(ConfigError, match='expected "N steps" or "N epochs"') as caught:
        parse_span(text)
    assert repr(text) in str(caught.value)
