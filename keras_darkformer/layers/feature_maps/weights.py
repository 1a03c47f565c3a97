"""Errors for weights that do not fit a layer with feature maps."""

from typing import Any

from keras_darkformer.types import Layer, Shape

HOW_TO_LOAD = (
    "Calibration may have put a map of another class into the layer they come from, as "
    '`method="clusters"` does. Make this layer with that layer\'s options, `feature_map` among '
    "them, or load a file that holds them: `.keras`, or a preset."
)


class CheckedWeights:
    """Mixin for layers with feature maps: says what differs before any weight is set."""

    name: str
    weights: list[Any]

    def set_weights(self, weights: list[Any]) -> None:
        """Sets the values of all weights.

        Raises:
            ValueError: if their number or their shapes differ. No weight has then changed.
        """
        shapes, here = ([tuple(x.shape) for x in found] for found in (weights, self.weights))
        if shapes != here:
            wrong = next(
                (
                    f"{w.path!r} of shape {x}, received shape {y}"
                    for w, x, y in zip(self.weights, here, shapes, strict=False)
                    if x != y
                ),
                "as many as those received",
            )
            raise ValueError(
                f"{self.name!r} has {len(here)} weights, with {_maps(self)}, and received "
                f"{len(shapes)}. The first that differs is {wrong}. {HOW_TO_LOAD}"
            )
        super().set_weights(weights)  # type: ignore[misc]


def check_stored(feature_map: Any, shapes: dict[str, Shape]) -> None:
    """Raises a ValueError unless a file has exactly a feature map's weights, of these shapes."""
    here = {weight.name: tuple(weight.shape) for weight in feature_map.weights}
    if shapes == here:
        return
    if not shapes:  # Keras then looks in other places, and this is the last error
        raise ValueError(
            f"The file has no weights for {feature_map.name!r}, of "
            f"`feature_map={feature_map.kind!r}`, where Keras looked last. {HOW_TO_LOAD} Weights "
            "of a softmax model are loaded into that model, which is then converted."
        )
    raise ValueError(
        f"{feature_map.name!r}, of `feature_map={feature_map.kind!r}`, has the weights {here}; the "
        f"file has {shapes}. {HOW_TO_LOAD}"
    )


def _maps(layer: Layer) -> str:
    """The kinds of the feature maps in a layer."""
    kinds = {x.kind for x in layer._flatten_layers() if hasattr(x, "kind") and hasattr(x, "fold")}
    return " and ".join(f"`feature_map={kind!r}`" for kind in sorted(kinds)) or "no feature map"
