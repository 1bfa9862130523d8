"""Which layers get how many bits: sensitivities, and an exact allocator under a budget."""
