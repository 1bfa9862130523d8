"""Rewrites that leave a block's function as it is, and make its weights easier to round: one file each."""
