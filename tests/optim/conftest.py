from collections.abc import Iterator

import pytest

from opt8bit.backends import available


@pytest.fixture(autouse=True, scope="module")
def large_tiles() -> Iterator[None]:
    """Triton's interpreter takes as long for many elements as for few; test_triton.py has tiles as they are."""
    if "triton" not in available("cpu"):
        yield
        return
    from opt8bit.backends.triton import launches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "TILE", 2**14)
        yield
