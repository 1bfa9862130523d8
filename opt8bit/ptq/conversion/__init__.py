"""A packed checkpoint in another layout, with the same codes and scales."""
