"""Keras layers."""

from keras_darkformer.layers.dark_attention import DarkAttention
from keras_darkformer.layers.dark_transformer_block import DarkTransformerBlock
from keras_darkformer.layers.feature_maps import (
    DarkFeatureMap,
    ExponentialFeatureMap,
    FeatureMap,
    NoFeatureMap,
)

__all__ = [
    "DarkAttention",
    "DarkFeatureMap",
    "DarkTransformerBlock",
    "ExponentialFeatureMap",
    "FeatureMap",
    "NoFeatureMap",
]
