"""Keras models with `MultiHeadAttention` and `GroupQueryAttention` in them, made linear in time."""
