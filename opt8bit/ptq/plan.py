"""Plans what a recipe means for the layers of a model: which method rounds each of them, and to which scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from opt8bit.ptq.calibration.loss_weighting import LossWeighting
from opt8bit.ptq.group_sizes import default_group_size
from opt8bit.ptq.model.blocks import block_layers, matrix
from opt8bit.ptq.reconstruction.engine import Reconstruction
from opt8bit.ptq.reconstruction.parametrization import Parametrization
from opt8bit.ptq.reconstruction.scales import TrainScales
from opt8bit.ptq.rounding import RTN, OutlierQuantEase, QuantEase, Rounder
from opt8bit.ptq.rounding.rounder import check_needs
from opt8bit.ptq.schemes import fallen_back, log_fallbacks, scheme_for
from opt8bit.ptq.transforms.transform import Transform
from opt8bit.quant.grid import SCALE_DTYPES
from opt8bit.quant.weight import WeightScheme
from opt8bit.recipe.gguf_types import is_gguf_type
from opt8bit.recipe.learning import EFFORTS
from opt8bit.recipe.recipe import (
    AUTO,
    ERROR_PROPAGATION,
    GROUP_SIZES,
    LOSS_WEIGHTING,
    POLISH,
    SERVED_SYMMETRIC,
    Recipe,
)
from opt8bit.recipe.registry import FORMATS, GRIDS, RECONSTRUCTIONS, ROUNDERS, TRANSFORMS
from opt8bit.recipe.runtimes import Runs, runtime_of


@dataclass(frozen=True)
class LayerPlan:
    """Says how a layer is rounded and corrected; see :class:`Recipe`.

    Attributes:
        method: rounds its weight.
        scheme: of the rounded weight.
        error_propagation, bias_correction, statistic: as a recipe has them.
        note: what the report says of the scheme, if it is not the one that was asked for.
    """

    method: Rounder
    scheme: WeightScheme
    error_propagation: float = 0.0
    bias_correction: str = "none"
    statistic: str = "mean"
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """Says what becomes of a model.

    Attributes:
        recipe: that was asked for, with what depends on the model filled in.
        layers: by name; None for those that stay as they are.
        error_propagation: of layers that look at their inputs.
        loss_weighting: of the tokens in all statistics; None where they count alike.
        transforms: of each block, before its layers are rounded.
        reconstruction: of each block afterwards; None for none.
        runtime: that is to run the result, a name of :data:`RUNTIMES`; None for none in particular.
        outside: how matrices outside of the blocks are stored, which are rounded to nearest; None for as they are.
    """

    recipe: Recipe
    layers: Mapping[str, LayerPlan | None]
    error_propagation: float
    loss_weighting: LossWeighting | None = None
    transforms: tuple[Transform, ...] = ()
    reconstruction: Reconstruction | None = None
    runtime: str | None = None
    outside: WeightScheme | None = None

    @property
    def bias_correction(self) -> str:
        return self.recipe.bias_correction

    @property
    def statistic(self) -> str:
        return self.recipe.statistic

    @property
    def learns(self) -> bool:
        """Whether the compressed model is trained as a whole."""
        return EFFORTS[self.recipe.learn].steps > 0

    @property
    def looks_at_inputs(self) -> bool:
        """Whether any layer's method does."""
        return any(plan is not None and plan.method.looks_at_inputs for plan in self.layers.values())

    def of(self, name: str) -> LayerPlan | None:
        """Returns the plan for one layer, or None where it stays as it is."""
        return self.layers[name]


def plan_for(
    model: nn.Module, recipe: Recipe, checkpoint_format: str | None = None, runtime: str | None = None
) -> Plan:
    """Returns what a recipe comes to for a model.

    Scales are stored in the dtype of a layer's weight, as packed checkpoints have them, unless the format has another.

    Args:
        model: to be compressed.
        recipe: for it.
        checkpoint_format: that the result is meant for, a name of :data:`FORMATS`; None for none.
        runtime: that is to run it, a name of :data:`RUNTIMES`; None for none in particular.

    Raises:
        TypeError, ValueError: the recipe contradicts itself, or does not fit the model. The message names the layer.
    """
    layers = block_layers(model)
    runs = _runs(runtime, checkpoint_format)
    recipe = _settled(recipe, model, checkpoint_format, runs)
    for override in recipe.override_list:
        if not any(fnmatchcase(name, override.pattern) for name in layers):
            raise ValueError(f"overrides[{override.pattern!r}] fits no layer; there is {min(layers)}, for example")
    whole = rounder_of(recipe)
    strength = recipe.error_propagation
    if strength is None:
        strength = ERROR_PROPAGATION if whole.looks_at_inputs and recipe.bias_correction != "local" else 0.0
    weighting = recipe.loss_weighting
    if weighting is None:
        weighting = LOSS_WEIGHTING if whole.looks_at_inputs else "none"
    _check_inputs(recipe, whole, strength)
    plans: dict[tuple[Recipe, torch.dtype, str], LayerPlan] = {}  # one object for those that are alike
    found: dict[str, LayerPlan | None] = {}
    for name, layer in layers.items():
        own = recipe.of(name)
        if own is None:
            found[name] = None
            continue
        own = _settled(own, model, checkpoint_format, runs)
        own, note = fallen_back(own, matrix(layer).shape[1], checkpoint_format)
        key = own, _scale_dtype(layer, checkpoint_format), note
        if key not in plans:
            plans[key] = _layer_plan(*key, strength)
        found[name] = plans[key]
    if not any(found.values()):
        raise ValueError("overrides leave every layer as it is")
    log_fallbacks(model, {name: own.note for name, own in found.items() if own is not None})
    transforms = tuple(TRANSFORMS[each]() if isinstance(each, str) else each for each in recipe.transforms)
    trained = _reconstruction(recipe.reconstruction, found)
    if EFFORTS[recipe.learn].steps:
        _check_trains(TrainScales(), found)
    outside = None if checkpoint_format is None else FORMATS[checkpoint_format].outside
    return Plan(recipe, found, strength, _loss_weighting(weighting), transforms, trained, runtime, outside)


def _runs(runtime: str | None, checkpoint_format: str | None) -> Runs | None:
    """Returns what a runtime runs of a packed format, or None without a runtime, or where the format is not packed."""
    named = runtime_of(runtime)
    return None if named is None or checkpoint_format is None else named.formats.get(checkpoint_format)


def _settled(recipe: Recipe, model: nn.Module, checkpoint_format: str | None, runs: Runs | None) -> Recipe:
    """Returns the recipe with what depends on the model, the checkpoint's format and its runtime filled in."""
    if recipe.group_size == AUTO and not is_gguf_type(recipe.grid):
        sizes = _group_sizes(recipe, runs)
        recipe = replace(recipe, group_size=default_group_size(model, recipe.override_list, sizes))
    if recipe.symmetric is None and recipe.grid is None:
        recipe = replace(recipe, symmetric=_is_symmetric(recipe, model, checkpoint_format, runs))
    return recipe


def _group_sizes(recipe: Recipe, runs: Runs | None) -> list[int]:
    """Returns the group sizes to choose from, the largest first: that of the grid, if it has one."""
    if isinstance(recipe.grid, str):
        return [GRIDS[recipe.grid].group_size]
    return [size for size in GROUP_SIZES if runs is None or runs.group_sizes is None or size in runs.group_sizes]


def _is_symmetric(recipe: Recipe, model: nn.Module, checkpoint_format: str | None, runs: Runs | None) -> bool:
    """Tells whether grids are symmetric where the recipe leaves that open."""
    format = None if checkpoint_format is None else FORMATS[checkpoint_format]
    if format is None or not format.is_packed:
        return False
    if format.is_symmetric:
        return True
    return recipe.bits in SERVED_SYMMETRIC if runs is None else _needs_symmetry(recipe, model, runs)


def _needs_symmetry(recipe: Recipe, model: nn.Module, runs: Runs) -> bool:
    """Tells whether a runtime runs only symmetric grids of layers whose grids were left to it.

    Where grids may have zero points they do: their squared error is the lowest. Layers of several widths or group sizes
    are loaded with symmetric grids only; see the format compressed-tensors.
    """
    asymmetric = replace(recipe, symmetric=False)
    layers = {own for name in block_layers(model) if (own := asymmetric.of(name)) is not None and own.grid is None}
    kinds = {(own.bits, own.symmetric, own.group_size) for own in layers}
    return len(kinds) > 1 or any(bits not in runs.asymmetric for bits, _, _ in kinds)


def rounder_of(recipe: Recipe) -> Rounder:
    """Returns the rounding method that a recipe describes.

    Raises:
        TypeError, ValueError: what it needs cannot be known.
    """
    rounder = _rounder_of(recipe)
    check_needs(rounder)
    return rounder


def _rounder_of(recipe: Recipe) -> Rounder:
    if not isinstance(recipe.method, str):
        return recipe.method
    # QuantEase is what polish does, here to weights that are rounded to nearest.
    start: Rounder = RTN() if recipe.method == "quantease" else ROUNDERS[recipe.method](**_given(recipe, "act_order"))
    if recipe.outliers:
        start = OutlierQuantEase(recipe.outliers, recipe.outlier_structure or "unstructured", start=start)
    polish = recipe.method != "rtn" if recipe.polish is None else recipe.polish
    return polished(start) if polish else start


def polished(start: Rounder) -> QuantEase:
    """Returns a method with the polish that the default recipe has."""
    return QuantEase(start=start, **POLISH)


def _given(recipe: Recipe, *names: str) -> dict[str, Any]:
    """Returns those options that were given; the method has defaults for the others."""
    values = {name: getattr(recipe, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _check_inputs(recipe: Recipe, rounder: Rounder, strength: float) -> None:
    """
    Raises:
        ValueError: more is asked of a method that looks at no inputs than it can do.
    """
    if rounder.looks_at_inputs:
        return
    if recipe.bias_correction == "joint":
        raise ValueError(f"{rounder!r} looks at no inputs: with bias_correction='joint' it would round as ever")
    if strength:
        raise ValueError(f"{rounder!r} looks at no inputs: error_propagation must be 0")
    if recipe.loss_weighting not in (None, "none"):
        raise ValueError(f"{rounder!r} looks at no inputs: loss_weighting must be 'none'")


def _loss_weighting(given: Any) -> LossWeighting | None:
    if isinstance(given, str):
        return LossWeighting() if given == "tokens" else None
    return given


def _reconstruction(given: Any, layers: Mapping[str, LayerPlan | None]) -> Reconstruction | None:
    """
    Raises:
        ValueError: what is trained cannot be, on the grid of a layer. The message names it.
    """
    engine: Reconstruction | None = Reconstruction(RECONSTRUCTIONS[given]()) if isinstance(given, str) else given
    if engine is not None:
        _check_trains(engine.parametrization, layers)
    return engine


def _check_trains(parametrization: Parametrization, layers: Mapping[str, LayerPlan | None]) -> None:
    """
    Raises:
        ValueError: the weight of a layer cannot be trained. The message names it.
    """
    for name, own in layers.items():
        for grid in () if own is None else own.method.grids(own.scheme):
            if not parametrization.trains(grid):
                raise ValueError(f"{name}: {type(parametrization).__name__} cannot train weights on {grid!r}")


def _layer_plan(recipe: Recipe, scale_dtype: torch.dtype, note: str, strength: float) -> LayerPlan:
    rounder = rounder_of(recipe)
    bias_correction = (
        "sequential" if recipe.bias_correction == "joint" and not rounder.looks_at_inputs else recipe.bias_correction
    )
    return LayerPlan(
        rounder,
        scheme_for(recipe, recipe.range or ("mse" if rounder.looks_at_inputs else "minmax"), scale_dtype),
        strength if rounder.looks_at_inputs else 0.0,
        bias_correction,
        recipe.statistic,
        note,
    )


def _scale_dtype(layer: nn.Module, checkpoint_format: str | None) -> torch.dtype:
    of_format = None if checkpoint_format is None else FORMATS[checkpoint_format].scale_dtype
    dtype = of_format or matrix(layer).dtype
    return dtype if dtype in SCALE_DTYPES else torch.float32
