"""The rules: one file for each family, and what they share."""
