"""Rounding methods: one file each, all on the same grids and the same layer objective."""

from opt8bit.ptq.rounding.gptq import GPTQ
from opt8bit.ptq.rounding.outlier_quantease import OutlierQuantEase
from opt8bit.ptq.rounding.quantease import QuantEase
from opt8bit.ptq.rounding.rounder import Rounder, objective
from opt8bit.ptq.rounding.rtn import RTN

METHODS: dict[str, type[Rounder]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "quantease": QuantEase,
    "outlier_quantease": OutlierQuantEase,
}

__all__ = [
    "GPTQ",
    "METHODS",
    "RTN",
    "OutlierQuantEase",
    "QuantEase",
    "Rounder",
    "objective",
]
