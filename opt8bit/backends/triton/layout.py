"""Where the kernels of a step find what they know of the tensors.

It is a table, in words of 64 bits: first the head, then the tensors' rows.
"""

import triton.language as tl

MAX_HYPER = tl.constexpr(12)  # hyper-parameters, float64
SEED = tl.constexpr(12)
HEAD = tl.constexpr(16)
# Of a row:
PARAM, GRAD, STEP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # addresses
STATES, SCALES = tl.constexpr(3), tl.constexpr(6)  # likewise, of at most three
COMPENSATION = tl.constexpr(9)  # likewise
NUMBER = tl.constexpr(10)  # of the parameter in its optimizer
ROW_LENGTH, BLOCK_SIZE = tl.constexpr(11), tl.constexpr(12)
BLOCKS_PER_ROW, BLOCKS = tl.constexpr(13), tl.constexpr(14)
FIRST_TILE, TILES = tl.constexpr(15), tl.constexpr(16)
FIRST_ELEMENT = tl.constexpr(17)  # its index in the whole parameter, where the tensor is a shard of one
ROW = tl.constexpr(18)

MAX_CONSTANTS = tl.constexpr(16)  # of a tensor's step
