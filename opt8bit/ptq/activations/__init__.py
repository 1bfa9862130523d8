"""Quantizers of what layers see: one file each."""
