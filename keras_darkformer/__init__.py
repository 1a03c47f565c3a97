"""Linear-time attention for Keras 3 whose random features fit the data."""
