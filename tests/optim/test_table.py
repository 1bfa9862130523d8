from opt8bit.optim.table import aligned


def test_columns_are_aligned() -> None:
    assert aligned(("name", "size"), [("a", "1,000,000"), ("longer", "1")]) == (
        "name         size\na       1,000,000\nlonger          1"
    )


def test_a_table_may_be_empty() -> None:
    assert aligned(("name", "size"), []) == "name  size"
