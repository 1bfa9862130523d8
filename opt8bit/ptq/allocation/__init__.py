"""Chooses how many bits each layer gets: sensitivities, and an exact allocator under a budget."""
