"""Keras layers."""

from keras_darkformer.layers.dark_attention import DarkAttention
from keras_darkformer.layers.dark_feature_map import DarkFeatureMap
from keras_darkformer.layers.dark_transformer_block import DarkTransformerBlock

__all__ = ["DarkAttention", "DarkFeatureMap", "DarkTransformerBlock"]
