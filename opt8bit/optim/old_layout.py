"""The old layout of states: codes of the ascending map, under torch.optim's names, beside an absmax.

They are read into the same values, bit for bit: bytes are counted from that of zero, under the scale that they had.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

ZERO_CODE = {True: 127, False: 0}  # of the ascending maps, by whether they are signed


def old_absmax(name: str) -> str:
    """Returns the name that a state's absmax had."""
    return f"{name}_absmax"


def is_old(state: Mapping[Any, Any], name: str) -> bool:
    """Tells whether a state is stored in the old layout."""
    return old_absmax(name) in state


def renewed_codes(codes: Tensor, signed: bool) -> Tensor:
    """Returns codes of the ascending map counted from that of zero; uint8."""
    return codes - ZERO_CODE[signed]  # modulo 256
