"""Linear-time attention for Keras models with `MultiHeadAttention` or `GroupQueryAttention`."""
