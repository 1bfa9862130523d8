"""Checkpoints with packed weights, whoever has written them: one file for each layout of codes, and what reads them."""
