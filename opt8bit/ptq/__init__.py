"""Compress and correct: round a trained model's weights, and, if asked, correct its outputs by Bias Compensation."""

from opt8bit.ptq.compress import compress
from opt8bit.ptq.evaluate import mean_loss, perplexity
from opt8bit.ptq.export import export
from opt8bit.ptq.layer import Recipe
from opt8bit.ptq.methods import GPTQ, RTN, Format, OutlierQuantEase, QuantEase
from opt8bit.ptq.result import LayerReport, Result
from opt8bit.ptq.source import Checkpoint
from opt8bit.ptq.verify import Verification, verify

__all__ = [
    "GPTQ",
    "RTN",
    "Checkpoint",
    "Format",
    "LayerReport",
    "OutlierQuantEase",
    "QuantEase",
    "Recipe",
    "Result",
    "Verification",
    "compress",
    "export",
    "mean_loss",
    "perplexity",
    "verify",
]
