"""Numbers: which values exist (codebooks), and how a tensor is stored in blocks of codes; grids of weights."""

from opt8bit.quant.blockwise import BlockView, block_view, dequantize_blockwise, quantize_blockwise
from opt8bit.quant.codebook import dynamic_map, linear_map, normal_float
from opt8bit.quant.grid import CodebookGrid, Grid, UniformGrid

__all__ = [
    "BlockView",
    "CodebookGrid",
    "Grid",
    "UniformGrid",
    "block_view",
    "dequantize_blockwise",
    "dynamic_map",
    "linear_map",
    "normal_float",
    "quantize_blockwise",
]
