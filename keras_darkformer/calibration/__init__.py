"""Fits features to queries and keys: NumPy in float64, one key/value head at a time."""
