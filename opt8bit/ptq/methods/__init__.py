"""Rounding methods: one file each, all on the same grids and the same layer objective."""

from opt8bit.ptq.methods.gptq import GPTQ
from opt8bit.ptq.methods.method import Method, objective
from opt8bit.ptq.methods.outliers import OutlierQuantEase
from opt8bit.ptq.methods.quantease import QuantEase
from opt8bit.ptq.methods.rtn import RTN

METHODS: dict[str, type[Method]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "quantease": QuantEase,
    "outlier_quantease": OutlierQuantEase,
}

__all__ = [
    "GPTQ",
    "METHODS",
    "RTN",
    "Method",
    "OutlierQuantEase",
    "QuantEase",
    "objective",
]
