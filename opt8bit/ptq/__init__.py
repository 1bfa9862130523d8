"""Compress and correct: round a trained model's weights, and, if asked, correct its outputs by Bias Compensation."""

from opt8bit.ptq.activations.quantizer import InputQuantizer
from opt8bit.ptq.allocation.layer_objective import allocate_bits
from opt8bit.ptq.calibration.loss_weighting import LossWeighting
from opt8bit.ptq.compress import compress
from opt8bit.ptq.conversion.convert import Conversion, convert
from opt8bit.ptq.correct import CorrectedModule, Correction, correct
from opt8bit.ptq.corrected_onnx.correction import correct_onnx
from opt8bit.ptq.correction.compensation import BiasCompensation
from opt8bit.ptq.evaluate import mean_loss, perplexity
from opt8bit.ptq.export import export
from opt8bit.ptq.export.checkpoint_format import CheckpointFormat
from opt8bit.ptq.layer_report import LayerReport
from opt8bit.ptq.model.folding import Link
from opt8bit.ptq.model.source import Checkpoint
from opt8bit.ptq.pairs.exported import with_modules
from opt8bit.ptq.pairs.loading import prepare_corrected
from opt8bit.ptq.reconstruction.engine import Reconstruction
from opt8bit.ptq.reconstruction.parametrization import Parametrization, TrainedWeight
from opt8bit.ptq.reconstruction.rounding import TrainRounding
from opt8bit.ptq.reconstruction.scales import TrainScales
from opt8bit.ptq.reconstruction.sign_round import SignRound
from opt8bit.ptq.reconstruction.sign_sgd import SignSGD
from opt8bit.ptq.refinement.refine import refine
from opt8bit.ptq.result import Result
from opt8bit.ptq.rounding import GPTQ, RTN, OutlierQuantEase, QuantEase, Rounder
from opt8bit.ptq.tasks.task import Task
from opt8bit.ptq.transforms.transform import Transform
from opt8bit.ptq.verification import Verification
from opt8bit.ptq.verify import verify
from opt8bit.quant.affine import AffineGrid
from opt8bit.quant.codebook_grid import CodebookGrid
from opt8bit.quant.grid import Grid
from opt8bit.quant.superblocks import SuperblockGrid
from opt8bit.quant.uniform import UniformGrid
from opt8bit.quant.weight import QuantizedWeight, WeightScheme
from opt8bit.recipe.recipe import Recipe

__all__ = [
    "GPTQ",
    "RTN",
    "AffineGrid",
    "BiasCompensation",
    "Checkpoint",
    "CheckpointFormat",
    "CodebookGrid",
    "Conversion",
    "CorrectedModule",
    "Correction",
    "Grid",
    "InputQuantizer",
    "LayerReport",
    "Link",
    "LossWeighting",
    "OutlierQuantEase",
    "Parametrization",
    "QuantEase",
    "QuantizedWeight",
    "Recipe",
    "Reconstruction",
    "Result",
    "Rounder",
    "SignRound",
    "SignSGD",
    "SuperblockGrid",
    "Task",
    "TrainRounding",
    "TrainScales",
    "TrainedWeight",
    "Transform",
    "UniformGrid",
    "Verification",
    "WeightScheme",
    "allocate_bits",
    "compress",
    "convert",
    "correct",
    "correct_onnx",
    "export",
    "mean_loss",
    "perplexity",
    "prepare_corrected",
    "refine",
    "verify",
    "with_modules",
]
