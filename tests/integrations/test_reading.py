"""Options that arrive as strings."""

import doctest

import pytest

from opt8bit.integrations import reading
from opt8bit.integrations.reading import optimizer_named, read, read_options


def test_the_examples() -> None:
    assert doctest.testmod(reading).failed == 0


@pytest.mark.parametrize("value", [None, 3, 0.5, (0.9, 0.95), "backward", "1,", "__import__('os')"])
def test_what_is_no_literal_is_left_alone(value: object) -> None:
    assert read(value) == ((1,) if value == "1," else value)


@pytest.mark.parametrize("text", ["128", "block_size", "block_size=1;x=2", "**{'a': 1}", "a=1) + (2", "a b=1"])
def test_what_is_no_option_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="options must be written as name=value"):
        read_options(text)


@pytest.mark.parametrize("name", ["AdamW", "adamw", "adamw8bit", "adamw_8bit", "AdamW8bit"])
def test_names(name: str) -> None:
    assert optimizer_named(name).__name__ == "AdamW"
    with pytest.raises(ValueError, match=r"must be one of AdamW, Adam, .* got 'adamax'"):
        optimizer_named("adamax")
