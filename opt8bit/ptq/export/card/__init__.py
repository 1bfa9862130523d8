"""Writes the model card of an exported folder."""
