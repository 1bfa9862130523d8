"""Compress and correct: round a trained model's weights, and, if asked, correct its outputs by Bias Compensation."""

from opt8bit.ptq.allocation.layer_objective import allocate_bits
from opt8bit.ptq.compress import compress
from opt8bit.ptq.correct import CorrectedModule, Correction, correct
from opt8bit.ptq.correction.compensation import BiasCompensation
from opt8bit.ptq.evaluate import mean_loss, perplexity
from opt8bit.ptq.export import export
from opt8bit.ptq.layer_report import LayerReport
from opt8bit.ptq.model.source import Checkpoint
from opt8bit.ptq.pairs.loading import prepare_corrected
from opt8bit.ptq.result import Result
from opt8bit.ptq.rounding import GPTQ, RTN, OutlierQuantEase, QuantEase
from opt8bit.ptq.verify import Verification, verify
from opt8bit.quant.weight import WeightScheme
from opt8bit.recipe.recipe import Recipe

__all__ = [
    "GPTQ",
    "RTN",
    "BiasCompensation",
    "Checkpoint",
    "CorrectedModule",
    "Correction",
    "LayerReport",
    "OutlierQuantEase",
    "QuantEase",
    "Recipe",
    "Result",
    "Verification",
    "WeightScheme",
    "allocate_bits",
    "compress",
    "correct",
    "export",
    "mean_loss",
    "perplexity",
    "prepare_corrected",
    "verify",
]
