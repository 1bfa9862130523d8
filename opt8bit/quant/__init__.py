"""Numbers: which values exist (codebooks), how tensors and states are stored in blocks of codes; grids of weights."""

from opt8bit.quant.affine import AffineGrid
from opt8bit.quant.blockwise import BlockView, block_view, dequantize_blockwise, quantize_blockwise
from opt8bit.quant.codebook import dynamic_map, linear_map, normal_float
from opt8bit.quant.codebook_grid import CodebookGrid
from opt8bit.quant.float4 import MXFP4Grid, NVFP4Grid
from opt8bit.quant.grid import Grid
from opt8bit.quant.state import decode_state, encode_state, state_map
from opt8bit.quant.superblocks import SuperblockGrid
from opt8bit.quant.uniform import UniformGrid

__all__ = [
    "AffineGrid",
    "BlockView",
    "CodebookGrid",
    "Grid",
    "MXFP4Grid",
    "NVFP4Grid",
    "SuperblockGrid",
    "UniformGrid",
    "block_view",
    "decode_state",
    "dequantize_blockwise",
    "dynamic_map",
    "encode_state",
    "linear_map",
    "normal_float",
    "quantize_blockwise",
    "state_map",
]
