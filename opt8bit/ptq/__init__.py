"""Compress and correct: round a trained model's weights, and, if asked, correct its outputs by Bias Compensation."""

from opt8bit.ptq.compress import compress
from opt8bit.ptq.evaluate import mean_loss, perplexity
from opt8bit.ptq.export import export
from opt8bit.ptq.layer import Recipe
from opt8bit.ptq.methods import GPTQ, RTN, OutlierQuantEase, QuantEase
from opt8bit.ptq.result import LayerReport, Result
from opt8bit.ptq.source import Checkpoint
from opt8bit.ptq.verify import Verification, verify
from opt8bit.quant.weight import WeightScheme

__all__ = [
    "GPTQ",
    "RTN",
    "Checkpoint",
    "LayerReport",
    "OutlierQuantEase",
    "QuantEase",
    "Recipe",
    "Result",
    "Verification",
    "WeightScheme",
    "compress",
    "export",
    "mean_loss",
    "perplexity",
    "verify",
]
