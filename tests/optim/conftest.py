from collections.abc import Iterator

import pytest
from cases import ANY_SHAPE, STATEFUL, Case

from opt8bit.backends import available


@pytest.fixture(autouse=True, scope="module")
def large_tiles() -> Iterator[None]:
    """Triton's interpreter takes as long for many elements as for few; test_triton.py has tiles as they are."""
    if "triton" not in available("cpu"):
        yield
        return
    from opt8bit.backends.triton import launch_table, launches

    with pytest.MonkeyPatch.context() as patch:
        for module in (launch_table, launches):
            patch.setattr(module, "TILE", 2**14)
        yield


@pytest.fixture(params=STATEFUL)
def stateful(request: pytest.FixtureRequest) -> Case:
    return STATEFUL[request.param]


@pytest.fixture(params=ANY_SHAPE)
def any_shape(request: pytest.FixtureRequest) -> Case:
    return ANY_SHAPE[request.param]
