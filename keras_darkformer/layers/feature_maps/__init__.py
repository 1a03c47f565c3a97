"""Feature maps: positive features whose products stand for the weights of attention."""

from keras_darkformer.layers.feature_maps.base import FeatureMap
from keras_darkformer.layers.feature_maps.dark import DarkFeatureMap
from keras_darkformer.layers.feature_maps.exponential import ExponentialFeatureMap
from keras_darkformer.layers.feature_maps.none import NoFeatureMap

__all__ = ["BY_KIND", "DarkFeatureMap", "ExponentialFeatureMap", "FeatureMap", "NoFeatureMap"]

# Classes by the value of the option `feature_map`.
BY_KIND: dict[str, type[FeatureMap]] = {
    cls.kind: cls for cls in (DarkFeatureMap, ExponentialFeatureMap, NoFeatureMap)
}
