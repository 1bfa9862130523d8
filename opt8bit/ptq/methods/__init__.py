"""Rounding methods: one file each, all on the same grids and the same layer objective."""

from opt8bit.ptq.methods.gptq import GPTQ
from opt8bit.ptq.methods.method import Format, Method, Outliers, Rounded, objective
from opt8bit.ptq.methods.quantease import QuantEase
from opt8bit.ptq.methods.rtn import RTN

__all__ = ["GPTQ", "RTN", "Format", "Method", "Outliers", "QuantEase", "Rounded", "objective"]
