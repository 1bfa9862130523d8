"""Modules."""

from opt8bit.nn.embedding import StableEmbedding, replace_embeddings

__all__ = ["StableEmbedding", "replace_embeddings"]
