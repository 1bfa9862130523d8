"""Writes files for llama.cpp."""
