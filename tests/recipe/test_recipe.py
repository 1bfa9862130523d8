"""Recipes: defaults, overrides, files; and what they come to for a model."""

import argparse
import json
import re
from dataclasses import dataclass, fields
from typing import Any

import pytest

from opt8bit.cli.flags import add_flags, add_old_flags, given
from opt8bit.cli.run_options import RunOptions
from opt8bit.ptq.rounding import GPTQ, RTN, Rounder
from opt8bit.ptq.transforms.fold_norm import FoldNorm
from opt8bit.quant.grid import RANGES as GRID_RANGES
from opt8bit.quant.uniform import UniformGrid
from opt8bit.recipe import Override, Recipe
from opt8bit.recipe.contradictions import METHOD_OPTIONS
from opt8bit.recipe.names import ELSEWHERE, RENAMED
from opt8bit.recipe.options import defaults_of, options_of
from opt8bit.recipe.recipe import RANGES, changed, layer_options
from opt8bit.recipe.registry import FORMATS, RECONSTRUCTIONS, ROUNDERS, TRANSFORMS, Registry

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
    "loss_weighting": "tokens",
    "transforms": ["fold_norm"],
    "reconstruction": "scales",
    "learn": "fast",
}


def test_every_option_has_another_value_here() -> None:
    without = {"act_order", "grid"}  # act_order is gptq's, and a grid has bits of its own
    assert OTHERS.keys() | without == options_of(Recipe).keys()
    for name, value in OTHERS.items():
        assert value != getattr(Recipe(), name)


def test_a_recipe_comes_back_from_its_file() -> None:
    overrides = {"*.0.*": None, "*_proj": {"bits": 8, "group_size": None}, "*": {"method": "gptq", "act_order": False}}
    back = {"*.1.*": {"symmetric": None, "group_size": "auto"}, "*": {"polish": None, "grid": None}}
    for recipe in (
        Recipe(),
        Recipe(**OTHERS),
        Recipe(grid="Q4_K", overrides={"*.up_proj": {"grid": "Q6_K"}, "*.down_proj": {"bits": 8, "group_size": 32}}),
        Recipe(group_size=None),
        Recipe(grid="nvfp4", range="minmax", overrides={"*.down_proj": {"grid": "mxfp4"}, "*.0.*": {"bits": 8}}),
        Recipe(bits=2, overrides=overrides),
        Recipe(symmetric=True, group_size=16, polish=False, overrides=back),
        Recipe(symmetric="restricted", overrides={"*_proj": {"symmetric": "restricted"}, "*": {"symmetric": False}}),
    ):
        written = json.loads(json.dumps(recipe.to_dict()))
        assert Recipe.from_dict(written) == recipe
    assert Recipe().to_dict() == {
        "method": "gptq",
        "bits": 4,
        "bias_correction": "none",
        "statistic": "mean",
        "outliers": 0.0,
        "learn": "none",
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
    rows: list[tuple[str, Any]] = [("method", RTN()), ("grid", UniformGrid(4)), ("transforms", [FoldNorm()])]
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
            [f"--{flag}"]
            if value is True
            else [word for each in (value if isinstance(value, list) else [value]) for word in (f"--{flag}", str(each))]
        )
    parsed = parser.parse_args(words)
    assert given(parsed, options_of(Recipe)) == OTHERS and given(parsed, options_of(RunOptions)) == {}
    assert parser.parse_args([]) == argparse.Namespace()  # what is not given leaves the file's value, or the default
    assert {flag for action in parser._actions for flag in action.option_strings} >= {
        f"--{each.metadata['option'].flag or each.name.replace('_', '-')}"
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
    ROUNDERS.register("mine", RTN)
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
    parser.add_argument("model")
    parsed = parser.parse_args(["--transforms", "fold_norm", "MODEL"])
    assert (parsed.transforms, parsed.model) == (["fold_norm"], "MODEL")  # a list leaves the command what is its own
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
        ({"symmetric": 1}, "symmetric must be true or false or 'restricted', got 1"),
        ({"outliers": -0.5}, r"outliers must be from 0 to 1, got -0\.5"),
        ({"method": "rtn", "outliers": 0.5}, "outliers are chosen by the inputs"),
        ({"method": GPTQ(), "polish": True}, "polish is that of method="),
        ({"method": "rtn", "act_order": True}, "it has no meaning for rtn"),
        ({"method": "quantease", "polish": False}, "quantease is coordinate descent: without polish nothing is left"),
        ({"error_propagation": 0.5, "bias_correction": "local"}, "bias_correction='local'"),
        ({"bias_correction": "joint", "statistic": "median"}, "bias_correction='joint' is least squares"),
        ({"overrides": {"*": {"seed": 1}}}, r"overrides\['\*'\]: 'seed' is none of method, .*, grid$"),
        ({"overrides": {"*": {"bits": 1}}}, r"overrides\['\*'\]: bits must be 2 to 8, got 1"),
        ({"group_size": -5}, "group_size must be at least 1, or 0, -1 or None for whole rows, got -5"),
        ({"overrides": {"*": {"group_size": -5}}}, r"overrides\['\*'\]: group_size must be at least 1"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": 3}, "method must be one of opt8bit.ptq, such as GPTQ(), or a name, got 3"),
        ({"method": ["gptq"]}, "method must be one of opt8bit.ptq, such as GPTQ(), or a name, got ['gptq']"),
        ({"method": GPTQ}, "or a name, got the class GPTQ: say GPTQ()"),
        ({"reconstruction": 1}, "reconstruction must be a name, or a Reconstruction, got 1"),
        ({"transforms": [1]}, "transforms must be names, or transforms, got 1"),
        ({"grid": 4}, "grid must be a name, or one of opt8bit.quant, such as UniformGrid(4), got 4"),
        ({"overrides": {"*": {"grid": 4}}}, "overrides['*']: grid must be a name, or one of opt8bit.quant"),
        ({"overrides": {3: None}}, "a pattern of overrides must be a string, got 3"),
        ({"overrides": {"*": 4}}, "overrides['*'] must be a mapping of options, or None, got 4"),
    ],
    ids=str,
)
def test_what_is_none_of_its_class_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        Recipe(**options)


def test_objects_whose_fields_may_change_are_refused() -> None:
    @dataclass
    class Thawed(Rounder):
        tries: int = 1

        def round(self, weight: Any, statistics: Any, scheme: Any) -> Any: ...

    given: list[dict[str, Any]] = [{"method": Thawed()}, {"overrides": {"*": {"method": Thawed()}}}]
    for options in given:
        with pytest.raises(TypeError, match=r"cannot be hashed, .*: make Thawed a @dataclass\(frozen=True\)"):
            Recipe(**options)


def test_overrides_that_say_nothing_come_back_from_a_file() -> None:
    recipe = Recipe(overrides={"*": None, "*.2.*": {}})
    written = json.loads(json.dumps(recipe.to_dict()))
    assert written["overrides"] == [{"layers": "*", "skip": True}, {"layers": "*.2.*", "skip": False}]
    assert Recipe.from_dict(written) == recipe and recipe.of("a.2.b") == Recipe() and recipe.of("a.1.b") is None
    twice = [{"layers": "*", "bits": 3}, {"layers": "a", "bits": 2}, {"layers": "*", "bits": 8}]
    assert Recipe.from_dict({"overrides": twice}).to_dict()["overrides"] == twice


def test_what_is_no_mapping_is_no_recipe() -> None:
    for values in ([1], None, "bits"):
        with pytest.raises(ValueError, match="a recipe is an object with names of options, got "):
            Recipe.from_dict(values)  # type: ignore[arg-type]


def test_two_names_of_one_option_are_refused() -> None:
    both: dict[str, Any] = {"correct": "local", "bias_correction": "none"}
    for values in (both, dict(reversed(both.items()))):
        for use in (Recipe.from_dict, lambda given: changed(Recipe(), given), lambda given: Recipe(**given)):
            with (
                pytest.warns(DeprecationWarning, match="correct is called bias_correction now"),
                pytest.raises(ValueError, match="correct and bias_correction are one option: give bias_correction"),
            ):
                use(values)


def test_names_of_before_are_read_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RENAMED, "width", "bits")
    old: dict[str, Any] = {"correct": "local"}
    with pytest.warns(DeprecationWarning, match="correct is called bias_correction now"):
        assert Recipe(**old) == Recipe(bias_correction="local")
    with pytest.warns(DeprecationWarning, match="width is called bits now"):
        assert Recipe(overrides={"*": {"width": 3}}) == Recipe(overrides={"*": {"bits": 3}})
    with pytest.warns(DeprecationWarning, match="width is called bits now"):
        found = Recipe.from_dict({"overrides": [{"layers": "*", "width": 3}]})
    assert found == Recipe(overrides={"*": {"bits": 3}})


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_others_call_it_is_explained(name: str) -> None:
    options: dict[str, Any] = {name: 1}
    for use in (lambda: Recipe(**options), lambda: changed(Recipe(), options), lambda: Recipe.from_dict(options)):
        with pytest.raises((TypeError, ValueError), match=re.escape(f"; here it is {ELSEWHERE[name]}")):
            use()
    with pytest.raises(ValueError, match=re.escape(f"; here it is {ELSEWHERE[name]}")):
        Recipe(overrides={"*": options})
    first = re.split(r"[=, ]", ELSEWHERE[name])[0]
    assert first in {*(each.name for each in fields(Recipe)), "calibration"}


@pytest.mark.parametrize(
    ("registry", "wrong", "message"),
    [
        (ROUNDERS, GPTQ(), "method 'mine' must be a subclass, not an instance, of Rounder, got GPTQ("),
        (TRANSFORMS, FoldNorm(), "transforms 'mine' must be a subclass, not an instance, of Transform, got FoldNorm("),
        (RECONSTRUCTIONS, FoldNorm, "reconstruction 'mine' must be a subclass, not an instance, of Parametrization"),
        (FORMATS, type(FORMATS["dense"]), "format 'mine' must be an instance of CheckpointFormat, got <class"),
    ],
)
def test_only_what_belongs_there_is_registered(registry: Registry, wrong: Any, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        registry.register("mine", wrong)
    assert "mine" not in registry


def test_defaults_are_written_once() -> None:
    assert defaults_of(Recipe, METHOD_OPTIONS).keys() == set(METHOD_OPTIONS)
    grid = UniformGrid(3)
    assert Recipe(grid=grid, bits=Recipe.bits) == Recipe(grid=grid)  # as the docstring says
