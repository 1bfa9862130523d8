"""Finds the layers of a checkpoint that can be corrected by a bias that whoever loads it uses."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from opt8bit.ptq.model.bias_places import Place, Places, bias_places, why_uncorrected
from opt8bit.ptq.model.blocks import block_layers, is_linear
from opt8bit.ptq.model.running import Running
from opt8bit.ptq.model.source import Source
from opt8bit.ptq.pairs.rescaled import resemblance
from opt8bit.warning import first_of

RELATED = 0.5  # the least resemblance of a weight and what it was rounded to; that of unrelated ones is 0
LISTED = 4
USED = ("own", "switch")  # kinds of places
MOVED = "scales of its block are not where the reference has them, and it is not known where they went"


@dataclass
class Layers:
    """The linear layers of a checkpoint.

    Attributes:
        places: of a bias, by layer of the blocks; None where the class has none, with its switches on, too.
        corrected: names of those to correct.
        left: the others, and why.
    """

    places: Places
    corrected: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def layers_of(source: Source, quantized: Running, reference: Running, unknown: Collection[str]) -> Layers:
    """Finds the layers that can be corrected.

    Args:
        source: of the checkpoint.
        quantized: its model, with the weights that it computes with.
        reference: the float model, with scales where the checkpoint has them.
        unknown: names of blocks in which scales are elsewhere.

    Raises:
        ValueError: a weight has nothing to do with the reference's.
    """
    inside = block_layers(quantized.model)
    places = bias_places(source.model, inside)
    result = Layers({name: _used(place) for name, place in places.items()})
    for name in inside:
        why = _why_left(source, name, places)
        if why is None and any(name.startswith(f"{block}.") for block in unknown):
            why = MOVED
        if why is None:
            result.corrected.append(name)
        else:
            result.left[name] = why
    _check_related(quantized, reference, result.corrected)
    coded = None if source.files is None else source.files.coded
    for name, module in quantized.model.named_modules():
        stored = source.stored_name(f"{name}.weight") if is_linear(module) and name not in inside else None
        if stored is not None and coded is not None and coded.parts(stored) != (stored,):
            result.left[name] = "it is outside of the model's blocks"
    return result


def _used(place: Place | None) -> Place | None:
    """Returns a place that is used here."""
    return place if place is not None and place.kind in USED else None


def _check_related(quantized: Running, reference: Running, names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: a layer's weight has nothing to do with the reference's.
    """
    alien = []
    for name in names:
        quantized.need(name)
        reference.need(name)
        likeness = resemblance(quantized.model.get_submodule(name), reference.model.get_submodule(name))
        if likeness < RELATED:
            alien.append(f"{name} ({likeness:.2f})")
    if alien:
        raise ValueError(
            f"weights are not the reference's, rounded: the cosine of {first_of(alien, LISTED)} is below {RELATED}: "
            "give the float model that the checkpoint was made of; rotated weights cannot be compared"
        )


def _why_left(source: Source, name: str, places: Places) -> str | None:
    """Returns why a layer gets no correction, or None where it gets one."""
    place: Place | None = places[name]
    if place is not None and place.kind == "llama":
        return f"its class has no place for a bias here, only {place} has, and the class stays as it is"
    if place is not None and place.kind == "through":
        return f"its class has no place for a bias here, and its way through {place.name} is not taken"
    stored = source.stored_name(f"{name}.weight")
    if stored is None or not stored.endswith(".weight"):
        return f"its weight is stored as {stored}, beside which a bias has no name"
    return why_uncorrected(name, places)
