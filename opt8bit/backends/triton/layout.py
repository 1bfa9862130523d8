"""Says where the kernels of a step find what they know of the tensors.

It is a table, in words of 64 bits: first the head, then the tensors' rows.
"""

import numpy
import triton.language as tl

from opt8bit.backends.interface import ADDRESSES

HEAD_FIELDS = numpy.dtype([("hyper", numpy.float64, 12), ("seed", numpy.int64), ("unused", numpy.int64, 3)])
ROW_FIELDS = numpy.dtype(
    [
        ("at", ADDRESSES),
        ("number", numpy.int64),  # of the parameter in its optimizer
        ("row_length", numpy.int64),
        ("block_size", numpy.int64),
        ("blocks_per_row", numpy.int64),
        ("blocks", numpy.int64),
        ("first_tile", numpy.int64),
        ("tiles", numpy.int64),
        ("first_element", numpy.int64),  # its index in the whole parameter, where the tensor is a shard of one
    ]
)


def _word(name: str, fields: numpy.dtype = ROW_FIELDS) -> tl.constexpr:
    """Returns at which word of a row, or of the head, a field begins."""
    assert fields.fields is not None
    return tl.constexpr(fields.fields[name][1] // 8)


HEAD, ROW = tl.constexpr(HEAD_FIELDS.itemsize // 8), tl.constexpr(ROW_FIELDS.itemsize // 8)
SEED = _word("seed", HEAD_FIELDS)
PARAM, GRAD, STEP = (_word(name, ADDRESSES) for name in ("param", "grad", "step"))
STATES, SCALES = _word("states", ADDRESSES), _word("scales", ADDRESSES)
COMPENSATION = _word("compensation", ADDRESSES)
NUMBER = _word("number")
ROW_LENGTH, BLOCK_SIZE = _word("row_length"), _word("block_size")
BLOCKS_PER_ROW, BLOCKS = _word("blocks_per_row"), _word("blocks")
FIRST_TILE, TILES = _word("first_tile"), _word("tiles")
FIRST_ELEMENT = _word("first_element")

MAX_CONSTANTS = tl.constexpr(16)  # of a tensor's step
