"""Names for types that Keras leaves open."""

from typing import Any, TypeAlias

# A tensor of any backend, a variable, or an array that becomes a tensor.
Tensor: TypeAlias = Any
# Sizes: ints, or `None` where unknown during tracing.
Shape: TypeAlias = tuple[Any, ...]
# A Keras model or layer. Keras ships no type information.
Model: TypeAlias = Any
Layer: TypeAlias = Any
# Keyword arguments and configs.
Config: TypeAlias = dict[str, Any]
# What `fit` takes: strings, arrays, dicts of arrays or an iterable of batches.
Data: TypeAlias = Any
