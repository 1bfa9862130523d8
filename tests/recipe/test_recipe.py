"""Recipes: defaults, overrides, files; and what they come to for a model."""

import argparse
import json
from dataclasses import fields
from typing import Any

import pytest

from opt8bit.cli.flags import add_flags, add_old_flags, given
from opt8bit.cli.run_options import RunOptions
from opt8bit.quant.grid import RANGES as GRID_RANGES
from opt8bit.quant.uniform import UniformGrid
from opt8bit.recipe import Override, Recipe
from opt8bit.recipe.options import options_of
from opt8bit.recipe.recipe import RANGES, changed, layer_options
from opt8bit.recipe.registry import FORMATS, RECONSTRUCTIONS, ROUNDERS, TRANSFORMS, Registry
from opt8bit.recipe.renamed import RENAMED

# A value for each option that is not its default.
OTHERS: dict[str, Any] = {
    "method": "quantease",
    "bits": 3,
    "group_size": 32,
    "symmetric": True,
    "range": "minmax",
    "bias_correction": "sequential",
    "statistic": "median",
    "polish": True,
    "outliers": 0.25,
    "outlier_structure": "column",
    "error_propagation": 0.125,
    "transforms": ["fold_norm"],
    "reconstruction": "scales",
}


def test_every_option_has_another_value_here() -> None:
    assert OTHERS.keys() | {"act_order"} == options_of(Recipe).keys()  # act_order is gptq's
    for name, value in OTHERS.items():
        assert value != getattr(Recipe(), name)


def test_a_recipe_comes_back_from_its_file() -> None:
    overrides = {"*.0.*": None, "*_proj": {"bits": 8, "group_size": None}, "*": {"method": "gptq", "act_order": False}}
    back = {"*.1.*": {"symmetric": None, "group_size": "auto"}, "*": {"polish": None, "grid": None}}
    for recipe in (
        Recipe(),
        Recipe(**OTHERS),
        Recipe(group_size=None),
        Recipe(bits=2, overrides=overrides),
        Recipe(symmetric=True, group_size=16, polish=False, overrides=back),
    ):
        written = json.loads(json.dumps(recipe.to_dict()))
        assert Recipe.from_dict(written) == recipe
    assert Recipe().to_dict() == {
        "method": "gptq",
        "bits": 4,
        "bias_correction": "none",
        "statistic": "mean",
        "outliers": 0.0,
        "overrides": [],
    }
    assert Recipe(overrides=overrides).to_dict()["overrides"] == [
        {"layers": "*.0.*", "skip": True},
        {"layers": "*_proj", "bits": 8, "group_size": 0},
        {"layers": "*", "method": "gptq", "act_order": False},
    ]
    with pytest.raises(ValueError, match="bits of an override must be a whole number, got None"):
        Recipe.from_dict({"overrides": [{"layers": "*", "bits": None}]})


def test_files_of_an_older_version_are_read_and_unknown_keys_named() -> None:
    older = {"method": "gptq", "bits": 3, "group_size": 64, "symmetric": False, "overrides": []}
    assert Recipe.from_dict(older) == Recipe(bits=3, group_size=64, symmetric=False)
    with pytest.raises(ValueError, match="'width' is none of method, bits, "):
        Recipe.from_dict({**older, "width": 3})


def test_objects_cannot_be_written() -> None:
    rows: list[tuple[str, Any]] = [("method", object()), ("grid", UniformGrid(4)), ("transforms", [object()])]
    for name, value in rows:
        recipe = Recipe(**{name: value})
        with pytest.raises(ValueError, match=rf"{name}=.* cannot be written into a file"):
            recipe.to_dict()
    with pytest.raises(ValueError, match=r"grid=.* cannot be written into a file"):
        Recipe(overrides={"*": {"grid": UniformGrid(4)}}).to_dict()


def test_flags_are_those_of_the_fields() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Recipe)
    add_flags(parser, RunOptions)
    words = []
    for name, value in OTHERS.items():
        flag = name.replace("_", "-")
        words += (
            [f"--{flag}"] if value is True else [f"--{flag}", *(value if isinstance(value, list) else [str(value)])]
        )
    parsed = parser.parse_args(words)
    assert given(parsed, options_of(Recipe)) == OTHERS and given(parsed, options_of(RunOptions)) == {}
    assert parser.parse_args([]) == argparse.Namespace()  # what is not given leaves the file's value, or the default
    assert {flag for action in parser._actions for flag in action.option_strings} >= {
        f"--{each.name.replace('_', '-')}"
        for each in (*fields(Recipe), *fields(RunOptions))
        if "option" in each.metadata
    }


def test_words_are_those_of_what_they_name() -> None:
    assert RANGES == GRID_RANGES
    for registry in (ROUNDERS, FORMATS, TRANSFORMS, RECONSTRUCTIONS):
        assert len(registry) == len(list(registry)) > 0
        assert all(registry[name] is not None for name in registry)


def test_registries_take_objects_of_others() -> None:
    registry = Registry("thing", {"mine": "opt8bit.recipe:Recipe"})
    registry.register("yours", 3)
    assert dict(registry) == {"mine": Recipe, "yours": 3} and len(registry) == 2 and "other" not in registry
    with pytest.raises(ValueError, match="there is a thing of the name 'mine' already"):
        registry.register("mine", 4)
    with pytest.raises(ValueError, match="thing must be one of mine, yours, got 'other'"):
        registry.check("other")


def test_what_is_registered_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: Any = ROUNDERS
    monkeypatch.setattr(registered, "_found", {})
    with pytest.raises(ValueError, match="method must be one of rtn, gptq, quantease, got 'mine'"):
        Recipe(method="mine")
    ROUNDERS.register("mine", object)
    assert Recipe(method="mine").to_dict()["method"] == "mine"


def test_names_of_before_are_read_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(DeprecationWarning, match="correct is called bias_correction now"):
        assert Recipe.from_dict({"correct": "joint"}) == Recipe(bias_correction="joint")
    with pytest.warns(DeprecationWarning, match="correct is called bias_correction now"):
        assert changed(Recipe(), {"correct": "joint"}) == Recipe(bias_correction="joint")
    parser = argparse.ArgumentParser()
    add_flags(parser, Recipe)
    add_old_flags(parser, RENAMED)
    assert parser.parse_args(["--correct", "joint"]).correct == "joint"
    parser.print_help()
    assert "--correct" not in capsys.readouterr().out


@pytest.mark.parametrize("rows", [0, -1, None])
def test_whole_rows_go_by_several_names(rows: int | None) -> None:
    assert Recipe(group_size=rows, overrides={"*": {"group_size": rows}}) == Recipe(
        group_size=None, overrides={"*": {"group_size": None}}
    )


def test_the_last_override_that_fits_is_the_one() -> None:
    recipe = Recipe(bits=3, overrides={"*.q": {"bits": 8}, "a.*": None, "*.k": {"method": "rtn"}, "*.l": {"bits": 2}})
    assert recipe.of("b.q") == Recipe(bits=8) and recipe.of("b.v") == Recipe(bits=3)
    assert recipe.of("a.q") is None and recipe.of("a.l") == Recipe(bits=2)
    assert recipe.overrides == tuple(recipe.override_list) and isinstance(recipe.override_list[0], Override)


def test_an_overrides_method_and_grid_are_its_own() -> None:
    grid = UniformGrid(5)
    recipe = Recipe(
        outliers=0.1,
        polish=False,
        act_order=False,
        overrides={"r": {"method": "rtn"}, "g": {"grid": grid}, "b": {"bits": 8}, "p": {"polish": True}},
    )
    own = recipe.of("r")
    assert own is not None and (own.outliers, own.polish, own.act_order) == (0.0, None, None)
    own = recipe.of("p")
    assert own is not None and (own.outliers, own.polish, own.act_order) == (0.1, True, False)
    on_grid = Recipe(grid=grid, overrides={"b": {"bits": 8}, "g": {"group_size": 8}})
    assert on_grid.of("b") == Recipe(bits=8) and on_grid.of("g") == Recipe(grid=grid, group_size=8)
    own = recipe.of("g")
    assert own is not None and own.grid is grid


def test_options_are_changed_by_name() -> None:
    assert changed(Recipe(bits=3), {"bias_correction": "joint"}) == Recipe(bits=3, bias_correction="joint")
    with pytest.raises(TypeError, match="'width' is none of a recipe's method, bits, "):
        changed(Recipe(), {"width": 3})
    with pytest.raises(TypeError, match=r"recipe must be a Recipe, got \{'bits': 3\}"):
        changed({"bits": 3}, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gptqq"}, "method must be one of rtn, gptq, quantease, got 'gptqq'"),
        ({"bits": 9}, "bits must be 2 to 8, got 9"),
        ({"bits": True}, "bits must be a whole number, got True"),
        ({"bits": 4.0}, r"bits must be a whole number, got 4\.0"),
        ({"bits": None}, "bits must be a whole number, got None"),
        ({"group_size": "all"}, "group_size must be a whole number, got 'all'"),
        ({"group_size": False}, "group_size must be a whole number, got False"),
        ({"symmetric": 1}, "symmetric must be true or false, got 1"),
        ({"outliers": -0.5}, r"outliers must be from 0 to 1, got -0\.5"),
        ({"method": "rtn", "outliers": 0.5}, "outliers are chosen by the inputs"),
        ({"method": 3, "polish": True}, "polish is that of method="),
        ({"method": "rtn", "act_order": True}, "it has no meaning for rtn"),
        ({"bias_correction": "joint", "statistic": "median"}, "bias_correction='joint' is least squares"),
        ({"overrides": {"*": {"seed": 1}}}, r"overrides\['\*'\] may have method, .*, grid, got 'seed'"),
        ({"overrides": {"*": {"bits": 1}}}, r"overrides\['\*'\]: bits must be 2 to 8, got 1"),
        ({"grid": UniformGrid(3), "bits": 3}, "bits, symmetric and range are those of grid="),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_options_of_layers_are_fields() -> None:
    assert layer_options().keys() < options_of(Recipe).keys()
    assert "bias_correction" not in layer_options() and "bits" in layer_options()
