"""Training what rounding left: one engine, and one file for each way to put a rounded weight in parameters."""
