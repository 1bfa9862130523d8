import pytest


@pytest.fixture(autouse=True, scope="module")
def repeatable(one_thread: None) -> None:
    """What is computed twice has the same bits twice."""
