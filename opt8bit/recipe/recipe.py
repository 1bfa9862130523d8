"""Everything that is asked of a compression, and the only place where a default stands. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from opt8bit.recipe.contradictions import METHOD_OPTIONS, check_contradictions, grid_options
from opt8bit.recipe.learning import EFFORTS
from opt8bit.recipe.names import renamed, with_checked_names
from opt8bit.recipe.objects import NAMED, check_objects
from opt8bit.recipe.options import Option, check_values, defaults_of, option, options_of, values_of
from opt8bit.recipe.overrides import PATTERN, SKIP, Override, kept_group_size, kept_overrides, listed_overrides
from opt8bit.recipe.registry import NAMED_GRIDS, RECONSTRUCTIONS, ROUNDERS, TRANSFORMS

AUTO = "auto"
# What stands for an option that is left out where it depends on others.
GROUP_SIZES = (64, 32, 16)  # the first that divides all layers
SERVED_SYMMETRIC = (4, 8)  # bits that servers run on symmetric grids alone
ERROR_PROPAGATION = 0.5
POLISH = {"sweeps": 5, "refits": 3}  # a little descent, and the scales refitted, in turn
LOSS_WEIGHTING = "none"
CORRECTIONS = ("none", "local", "sequential", "joint")
STATISTICS = ("mean", "median", "position")
RANGES = ("minmax", "mse")
LOSS_WEIGHTINGS = ("none", "tokens")
STRUCTURES = ("unstructured", "column")
OVERRIDES = "overrides"


@with_checked_names
@dataclass(frozen=True)
class Recipe:
    """Says what becomes of a model's layers.

    Args:
        method: rounds: "gptq", "rtn" or "quantease", which is coordinate descent from rounding to nearest; or a
            rounding method itself, such as ``GPTQ(damping=0.05)``, which is taken as it is: ``polish``, ``outliers``
            and ``act_order`` are then its own and must be left out.
        bits: of a weight, 2 to 8.
        group_size: weights of a row that share a scale, a divisor of every layer's inputs; None, 0 or -1 for whole
            rows; "auto" for the first of 64, 32 and 16 that divides all layers, or whole rows where none does.
        symmetric: True for grids without a zero point, whose scales have a sign; "restricted" for such grids with
            positive scales; False for grids with a zero point; None for what servers ask for: True at 4 and 8 bits, in
            checkpoints that hold codes. See :class:`UniformGrid`.
        range: of a grid: "minmax" or "mse"; None for "mse", and "minmax" for RTN, which the other hurts. See
            :class:`UniformGrid`.
        grid: "nvfp4" or "mxfp4" for 4-bit floats, in groups of 16 or 32; the name of a type of llama.cpp's blocks, such
            as "Q4_K", which has a group size of its own, and rows that it does not divide get the type that llama.cpp
            falls back to; or any other grid, such as ``CodebookGrid(normal_float(4))``, whose ``range`` is its own and
            must be left out. ``bits`` and ``symmetric`` are the grid's own and must be left out; their defaults are as
            good as nothing.
        bias_correction: the stream that Bias Compensation takes its errors from: "none" for no bias; "local" for the
            float model's, as the paper's code has it: each layer's error on the float model's inputs, and in the
            block's last layer, if its output is added to the hidden states and it can hold a bias, the error of the
            whole block in its place; "sequential" for the inputs that the layer will see; "joint" for those, with the
            weights rounded on the centred covariance, so that the bias has its share.
        statistic: "mean" for least squares, "median" for least absolute error, both shrunk to what the data support;
            "position" for a mean at each position of a sequence, which only this package can apply.
        polish: coordinate descent and refitted scales after rounding; None for all methods but RTN.
        outliers: fraction of the weights to keep exact, 0 to 1.
        outlier_structure: "unstructured" for single weights, the default, or "column" for whole inputs.
        act_order: whether GPTQ goes by falling second moment of the inputs; None for yes.
        error_propagation: strength of the asymmetric target, 0 to 1: see :func:`asymmetric_target`. As much of the
            drift of the hidden states is in the errors that a bias of "sequential" or "joint" corrects. None for 0.5,
            and 0 where it has no place: for RTN, which looks at no inputs, and for
            ``bias_correction="local"``, which would undo it.
        loss_weighting: "tokens" for statistics in which a token counts as much as the loss of the model's predictions
            depends on it, or a :class:`LossWeighting` with another power or cap, which costs a pass forward and
            backward; "none" for statistics in which all tokens count alike. None for "none".
        transforms: rewrites of each block that leave its function as it is, before it is rounded, one after another:
            names, such as "fold_norm", or transforms themselves.
        reconstruction: what is trained of each block after its layers are rounded, so that it puts out what the float
            model's does: "scales", "rounding" (codes and scales), or a
            :class:`opt8bit.ptq.reconstruction.engine.Reconstruction`; None for nothing. What a report says of a layer
            is from before.
        learn: how much of the compressed model is trained as a whole in the end, by :func:`opt8bit.ptq.refine`: "none",
            "fast", "balanced" or "best".
        overrides: others of ``method``, ``bits``, ``group_size``, ``symmetric``, ``range``, ``grid``, ``polish``,
            ``outliers``, ``outlier_structure`` and ``act_order`` for layers by the pattern of their names, or None to
            leave the layers as they are. Only the last pattern that fits a layer counts; what it does not name is as in
            the recipe. What the recipe says of its own method is not meant where an override names another, nor of its
            own grid.

    Raises:
        TypeError, ValueError: an argument is none of these, or arguments contradict each other.
    """

    method: str | Any = option("gptq", ROUNDERS, "that rounds", of_layers=True)
    bits: int = option(4, int, "of a weight, 2 to 8", of_layers=True, metavar="N")
    group_size: int | str | None = option(
        AUTO,
        int,
        "weights of a row that share a scale; 0 for whole rows (default: what divides all layers, of 64, 32, 16 and 0)",
        of_layers=True,
        metavar="N",
    )
    symmetric: bool | str | None = option(
        None,
        bool,
        "grids without zero points, the scale has the sign (default: at 4 and 8 bits, as servers ask for it, but for "
        "dense)",
        of_layers=True,
        besides={"restricted": "such grids with positive scales alone"},
    )
    range: str | None = option(None, RANGES, "of a grid (default: mse; minmax for rtn)", of_layers=True)
    bias_correction: str = option("none", CORRECTIONS, "errors that Bias Compensation makes up for")
    statistic: str = option("mean", STATISTICS, "of the errors")
    polish: bool | None = option(
        None, bool, "coordinate descent and refitted scales after rounding (default: for all but rtn)", of_layers=True
    )
    outliers: float = option(0.0, float, "fraction of the weights to keep exact", of_layers=True, metavar="F")
    outlier_structure: str | None = option(
        None, STRUCTURES, "single weights, or whole inputs (default: unstructured)", of_layers=True
    )
    act_order: bool | None = option(
        None, bool, "GPTQ by falling second moment of the inputs (default: yes)", of_layers=True
    )
    error_propagation: float | None = option(
        None, float, "strength of the asymmetric target, 0 to 1 (default: 0.5; 0 for rtn and local)", metavar="ALPHA"
    )
    loss_weighting: str | Any = option(
        None, LOSS_WEIGHTINGS, "tokens count as much as the loss depends on them, or alike (default: none)"
    )
    transforms: Sequence[Any] = option(
        (), TRANSFORMS, "rewrites of each block that leave its function as it is, before it is rounded", several=True
    )
    reconstruction: Any = option(
        None, RECONSTRUCTIONS, "what is trained of each block after its layers are rounded (default: nothing)"
    )
    learn: str = option(
        "none", EFFORTS, "how long scales, norms and biases of the whole model are trained, once it is compressed"
    )
    grid: Any = option(
        None,
        NAMED_GRIDS,
        "4-bit floats, or a type of llama.cpp's blocks (default: what bits and symmetric say)",
        of_layers=True,
    )
    overrides: Mapping[str, Mapping[str, Any] | None] | tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        _set(self, overrides=kept_overrides(self.overrides, layer_options()))
        _set(self, group_size=kept_group_size(self.group_size))
        if isinstance(self.transforms, list):
            _set(self, transforms=tuple(self.transforms))
        check_objects(self)
        check_values(options_of(Recipe), _named(self))
        check_contradictions(self)
        for override in self.override_list:
            self._overridden(override)

    @property
    def override_list(self) -> tuple[Override, ...]:
        """The overrides, as they are kept."""
        assert isinstance(self.overrides, tuple)
        return self.overrides

    def of(self, name: str) -> Recipe | None:
        """Returns the recipe for one layer, without overrides, or None where it stays as it is."""
        for override in reversed(self.override_list):
            if fnmatchcase(name, override.pattern):
                return self._overridden(override)
        return replace(self, overrides=())

    def _overridden(self, override: Override) -> Recipe | None:
        if override.options is None:
            return None
        given = dict(override.options)
        if "method" in given:
            given = {**defaults_of(Recipe, METHOD_OPTIONS), **given}
        if given.get("grid") is not None:
            given = {**defaults_of(Recipe, grid_options(given["grid"])), **given}
        elif given.keys() & (set(grid_options(self.grid)) - {"group_size"}):
            given = {"grid": None, **given}
        try:
            return replace(self, overrides=(), **given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"overrides[{override.pattern!r}]: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as a file has it, in JSON's types.

        Raises:
            ValueError: it has a rounding method or a grid that is an object and no name.
        """
        overrides = []
        for each in self.override_list:
            # One without options says that its layers are not skipped, as another pattern might have it.
            said = _in_file(each.options) if each.options else {SKIP: each.options is None}
            overrides.append({PATTERN: each.pattern, **said})
        own = _in_file({**values_of(self), "group_size": self.group_size}.items())
        if "grid" in own:  # which says the bits
            del own["bits"]
        # What an override says is said, even where it is the default: the recipe may have something else.
        return {**{n: value for n, value in own.items() if value not in (None, AUTO, [])}, OVERRIDES: overrides}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Returns the recipe that a file has.

        Raises:
            ValueError: it is no mapping, a key is unknown, or an option cannot have its value; the message names it.
        """
        return cls(**read_values(values))


def read_values(values: Any, beside: Mapping[str, Option] | None = None) -> dict[str, Any]:
    """Returns a file's options by name, checked one by one, and its overrides.

    Args:
        values: that the file has.
        beside: options that the file may have beside those of a recipe, by name.

    Raises:
        ValueError: it is no mapping, a key is unknown, or an option cannot have its value; the message names it.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"a recipe is an object with names of options, got {values!r}")
    values = renamed(values)
    listed = values.pop(OVERRIDES, [])
    allowed = {**options_of(Recipe), **(beside or {})}
    check_values(allowed, values, also=[OVERRIDES])
    return {**values, OVERRIDES: listed_overrides(listed, layer_options(), defaults_of(Recipe))}


def changed(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """Returns a recipe with other options.

    Raises:
        TypeError, ValueError: there are no such options, or the recipe cannot have them.
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, got {recipe!r}")
    return replace(recipe, **renamed(options))  # before the names of before meet the recipe's own


def layer_options() -> dict[str, Option]:
    """Returns the options that single layers may have others of, by name."""
    return {name: each for name, each in options_of(Recipe).items() if each.of_layers}


def _in_file(values: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """
    Raises:
        ValueError: one is an object that no file can hold.
    """
    found: dict[str, Any] = {name: 0 if name == "group_size" and value is None else value for name, value in values}
    if "transforms" in found:
        found["transforms"] = list(found["transforms"])
    for name in ("method", "grid", "loss_weighting", "transforms", "reconstruction"):
        value = found.get(name)
        if not all(isinstance(each, str | None) for each in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{name}={value!r} cannot be written into a file")
    return found


def _named(recipe: Recipe) -> dict[str, Any]:
    """Returns the options that are not their defaults, except whole rows and methods that are no names."""
    found = {}
    for each in fields(Recipe):
        value, is_option = getattr(recipe, each.name), "option" in each.metadata
        if is_option and (type(value) is not type(each.default) or value != each.default):
            found[each.name] = value
    for name in NAMED:
        if not isinstance(getattr(recipe, name), str | None):
            del found[name]
    if recipe.group_size is None:
        del found["group_size"]
    if isinstance(recipe.transforms, tuple):
        found["transforms"] = [each for each in recipe.transforms if isinstance(each, str)]
    return found


def _set(recipe: Recipe, **values: Any) -> None:
    """Sets fields while a recipe is made, in the form that they are kept in."""
    for name, value in values.items():
        object.__setattr__(recipe, name, value)
