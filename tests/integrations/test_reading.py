"""Options that arrive as strings."""

import doctest

import pytest

from opt8bit.integrations import reading
from opt8bit.integrations.reading import optimizer_named, read, read_options


def test_the_examples() -> None:
    assert doctest.testmod(reading).failed == 0


@pytest.mark.parametrize(
    "value",
    [None, 3, 0.5, (0.9, 0.95), "backward", "1,", "__import__('os')", "{[]: 1}", "-" * 20000 + "1"],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_literal_is_left_alone(value: object) -> None:
    assert read(value) == ((1,) if value == "1," else value)


@pytest.mark.parametrize(
    "text",
    [
        "128",
        "block_size",
        "block_size=1;x=2",
        "**{'a': 1}",
        "a=1) + (2",
        "a b=1",
        "a=1)(b=2",
        "lr=1e-3)#",
        "a=1).x(b=2",
        "a=1, a=2",
        "a=\0",
        "a=" + "-" * 20000 + "1",
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_option_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="options must be written as name=value"):
        read_options(text)


def test_values_are_as_they_are_written() -> None:
    found = read_options("target=all-linear, betas=[0.9, 0.95], lr=NaN, eps=-inf, name='a b',")
    assert str(found.pop("lr")) == "nan"
    assert found == {"target": "all-linear", "betas": (0.9, 0.95), "eps": float("-inf"), "name": "a b"}
    assert read_options("") == {} and read([1, 2]) == (1, 2)


@pytest.mark.parametrize("name", ["AdamW", "adamw", "adamw8bit", "adamw_8bit", "AdamW8bit"])
def test_names(name: str) -> None:
    assert optimizer_named(name).__name__ == "AdamW"
    with pytest.raises(ValueError, match=r"must be one of AdamW, Adam, .* got 'adamax'"):
        optimizer_named("adamax")
