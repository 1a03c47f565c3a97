"""LoRA beside feature maps."""

from pathlib import Path

import h5py
from keras import ops

from keras_darkformer.surgery.become import Mixin
from keras_darkformer.types import Layer, Tensor

# Group of a LoRA file that holds the feature maps.
LORA_FEATURE_MAPS = "feature_maps"


class LoraBackbone(Mixin):
    """Mixin that extends the LoRA of a stock backbone to its feature maps."""

    dark_layers: dict[int, Layer]

    def enable_lora(
        self, rank: int, target_layer_names: list[str] | None = None, *, train_geometry: bool = True
    ) -> None:
        """Enables LoRA as the stock backbone does, and keeps feature maps trainable.

        Args:
            rank: int. The rank of the factorization.
            target_layer_names: list of str, names of the layers to adapt; `None` for the stock
                model's defaults.
            train_geometry: bool. False freezes the feature maps with the rest.
        """
        super().enable_lora(rank, target_layer_names)
        for layer in self.dark_layers.values():
            layer.feature_map.trainable = train_geometry

    def save_lora_weights(self, filepath: str | Path) -> None:
        """Saves LoRA weights as the stock backbone does, and the feature maps with them.

        Feature maps are trained together with LoRA: an adapter is worth little without them.

        Args:
            filepath: path of the file; must end in `.lora.h5`.
        """
        super().save_lora_weights(filepath)
        with h5py.File(filepath, "a") as file:
            group = file.create_group(LORA_FEATURE_MAPS)  # also where no map has weights
            for name, weight in self._feature_map_weights().items():
                group[name] = ops.convert_to_numpy(weight)

    def load_lora_weights(self, filepath: str | Path) -> None:
        """Loads a file that `save_lora_weights` wrote for a backbone converted in the same way.

        Args:
            filepath: path of the file.

        Raises:
            ValueError: if the file was saved from a stock model, which numbers layers differently,
                or its feature maps have other shapes.
        """
        weights = self._feature_map_weights()
        with h5py.File(filepath, "r") as file:
            if LORA_FEATURE_MAPS not in file:
                raise ValueError(
                    f"{str(filepath)!r} has no feature maps: it was saved from a stock model. "
                    "Load it into the stock model and convert that."
                )
            saved = {
                f"{layer}/{name}": x[()]
                for layer, group in file[LORA_FEATURE_MAPS].items()
                for name, x in group.items()
            }
        shapes, here = (
            {name: tuple(x.shape) for name, x in found.items()} for found in (saved, weights)
        )
        if shapes != here:
            raise ValueError(
                f"{str(filepath)!r} is from a model converted or calibrated differently: its "
                f"feature maps have weights {shapes}, but those of {self.name!r} have {here}."
            )
        super().load_lora_weights(filepath)
        for name, weight in weights.items():
            weight.assign(saved[name])

    def _feature_map_weights(self) -> dict[str, Tensor]:
        """Weights of feature maps by layer and name."""
        return {
            f"{index}/{weight.name}": weight
            for index, layer in self.dark_layers.items()
            for weight in layer.feature_map.weights
        }
