"""Training a compressed model as a whole: its scales, norms and biases, while codes stay as they are."""
