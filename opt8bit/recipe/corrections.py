"""The words that corrections take, on the command line and in Python. Needs no torch."""

ORDERS = ("local", "sequential")
STATISTICS = ("mean", "median")
