"""Backbones of which some or all layers attend in linear time."""

import dataclasses
import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
from keras import ops
from keras_hub.src.utils.preset_utils import get_preset_loader

from keras_darkformer.compiling import compile_anew
from keras_darkformer.hub.attention import DarkHubAttention, head_sizes, layer_seed
from keras_darkformer.hub.families import Family
from keras_darkformer.hub.options import DarkOptions, Mixin, dark_name

# Group of a LoRA file that holds feature maps.
LORA_FEATURE_MAPS = "feature_maps"


class PresetLoading(Mixin):
    """`from_preset` of a dark class, for dark presets and for stock ones.

    Attributes:
        stock_cls: the KerasHub class the dark one is made of.
    """

    stock_cls: Any

    @classmethod
    def from_preset(cls, preset: str, load_weights: bool = True, **kwargs: Any) -> Any:
        """Loads a dark preset as it is, or loads a stock preset and converts it.

        Args:
            preset: as for the stock class, such as `"gemma_2b_en"`, or a
                directory `save_to_preset` wrote.
            load_weights: bool.
            **kwargs: for a stock preset, the arguments of `convert_to_dark`;
                others go to `keras_hub`, such as `dtype`.

        Returns:
            The dark model or backbone.

        Raises:
            ValueError: if arguments of the conversion are given for a dark
                preset, which has its own, or the model can't be converted.

        Example:

            model = keras_darkformer.hub.DarkGemmaCausalLM.from_preset(
                "gemma_2b_en", num_features=256)
        """
        dark, others = DarkOptions.split(kwargs)
        if not issubclass(get_preset_loader(preset).check_backbone_class(), DarkBackbone):
            options = DarkOptions(**dark)
            stock = cls.stock_cls.from_preset(preset, load_weights, **others)
            model = cls.take_over(stock, options)
            warn_of_dropped(model)
            return model
        if dark:
            raise ValueError(
                f"Preset {preset!r} is dark already and is loaded as it was saved. Arguments of "
                f"the conversion go with stock presets only. Received: {sorted(dark)}"
            )
        return super().from_preset(preset, load_weights, **others)


class DarkBackbone(PresetLoading):
    """Turns a KerasHub backbone, its base class in Python, dark.

    Attributes:
        family: the `Family` this backbone is of.
        stock_cls: the KerasHub class this one is made of.
        attention_cls: what its attention layers become.
        dark_options: `DarkOptions`, resolved.
    """

    family: Family
    attention_cls: type[DarkHubAttention]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        dark, stock = DarkOptions.split(kwargs, self.stock_cls)
        options = DarkOptions(**dark)
        super().__init__(*args, **stock)
        self._darken(self._resolve(self, options))

    @classmethod
    def take_over(cls, backbone: Any, options: DarkOptions) -> Any:
        """Makes a stock backbone dark, in place, and returns it.

        The object itself changes class. Copying its weights into a second
        model would double the memory, and sharing its layers would leave a
        stock object behind whose layers are dark, and which saves itself as a
        softmax model.
        """
        options = cls._resolve(backbone, options)
        backbone.__class__ = cls
        backbone._darken(options)
        backbone._renumber_lora_layers()
        compile_anew(backbone)
        return backbone

    @classmethod
    def _resolve(cls, backbone: Any, options: DarkOptions) -> DarkOptions:
        family = cls.family
        if (reason := family.refuse(backbone)) is not None:
            raise ValueError(reason)
        if options.sliding_window is not None and not family.causal:
            raise ValueError(
                f"`sliding_window` needs causal attention; {family.name}'s goes in both "
                f"directions. Received: sliding_window={options.sliding_window}"
            )
        if options.rope_geometry != "after" and family.rotary is None:
            raise ValueError(
                f"`rope_geometry={options.rope_geometry!r}` needs rotary positions, which "
                f"{family.name} does not have."
            )
        layers = [family.attention_of(block) for block in backbone.transformer_layers]
        is_local = [family.window(layer) is not None for layer in layers]
        return options.resolve(is_local, head_sizes(layers[0])[2])

    def _darken(self, options: DarkOptions) -> None:
        forms = options.feature_forms or ()
        counts = options.num_features
        if not isinstance(counts, Sequence):
            counts = [counts] * len(forms)
        for index, form, count in zip(options.layer_indices, forms, counts, strict=True):
            block = self.transformer_layers[index]
            of_layer = dataclasses.replace(
                options, num_features=count, seed=layer_seed(options.seed, index)
            )
            self.attention_cls.take_over(self.family.attention_of(block), of_layer, form)
            _pass_on_padding_mask(block, self.family)
        self.dark_options = options

    def _renumber_lora_layers(self) -> None:
        """Has LoRA that was enabled before the conversion find its layers again.

        The stock backbone knows them by their places among all layers with
        weights, and feature maps have moved these.
        """
        if getattr(self, "_lora_enabled_layers", None):
            layers = [x for x in self._flatten_layers(include_self=False) if x.weights]
            self._lora_enabled_layers = [
                index for index, x in enumerate(layers) if getattr(x, "lora_enabled", False)
            ]

    def dropped(self) -> list[dict[str, Any]]:
        """What the converted layers no longer do: dicts of `what`, `why` and `layers`."""
        found: dict[tuple[str, str], list[int]] = {}
        linear = self.dark_options.attention_mode == "linear"
        for index in self.dark_options.layer_indices:
            block = self.transformer_layers[index]
            if (soft_cap := getattr(block, "logit_soft_cap", None)) is not None:
                what = f"soft cap of the attention logits at {soft_cap}"
                why = "A bounded logit is no dark kernel."
                found.setdefault((what, why), []).append(index)
            if linear and (window := self.family.window(self.family.attention_of(block))):
                what = f"sliding window of {window} tokens"
                why = "Features sum over all the past; these layers now see all of it."
                found.setdefault((what, why), []).append(index)
            if linear and self.attention_cls.drops_weights and block.dropout:
                what = "dropout of single attention weights"
                why = "Linear attention forms none; whole tokens are dropped at the same rate."
                found.setdefault((what, why), []).append(index)
        return [{"what": what, "why": why, "layers": where} for (what, why), where in found.items()]

    def enable_lora(
        self, rank: int, target_layer_names: list[str] | None = None, *, train_geometry: bool = True
    ) -> None:
        """Enables LoRA as the stock backbone does, and keeps feature maps trainable.

        Args:
            rank: int. The rank of the factorization.
            target_layer_names: names of the layers to adapt; `None` for the
                stock model's.
            train_geometry: bool. False freezes the feature maps with the rest.
        """
        super().enable_lora(rank, target_layer_names)
        for layer in self.dark_layers:
            layer.feature_map.trainable = train_geometry

    def save_lora_weights(self, filepath: str | Path) -> None:
        """Saves LoRA weights as the stock backbone does, and the feature maps with them.

        Feature maps are trained beside LoRA, so an adapter is worth little
        without its own.

        Args:
            filepath: where to; must end in `.lora.h5`.
        """
        super().save_lora_weights(filepath)
        with h5py.File(filepath, "a") as file:
            for name, weight in self._feature_map_weights().items():
                file[f"{LORA_FEATURE_MAPS}/{name}"] = ops.convert_to_numpy(weight)

    def load_lora_weights(self, filepath: str | Path) -> None:
        """Loads what `save_lora_weights` of a dark backbone converted alike has saved.

        Args:
            filepath: path of the file.

        Raises:
            ValueError: if the file is a stock model's, which numbers layers
                otherwise, or its feature maps are of other shapes.
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
                f"{str(filepath)!r} is of a model that was converted or calibrated otherwise: its "
                f"feature maps have weights {shapes}, those of {self.name!r} {here}."
            )
        super().load_lora_weights(filepath)
        for name, weight in weights.items():
            weight.assign(saved[name])

    def _feature_map_weights(self) -> dict[str, Any]:
        """Weights of feature maps by layer and name."""
        return {
            f"{index}/{weight.name}": weight
            for index, layer in zip(self.dark_options.layer_indices, self.dark_layers, strict=True)
            for weight in layer.feature_map.weights
        }

    def get_config(self) -> dict[str, Any]:
        """The stock backbone's config and the options of the conversion."""
        options = self.dark_options.get_config()
        # Calibration changes these.
        options["feature_forms"] = [layer.feature_map.form for layer in self.dark_layers]
        counts = [layer.feature_map.num_features for layer in self.dark_layers]
        options["num_features"] = counts[0] if len(set(counts)) == 1 else counts
        dark = {dark_name(name, self.stock_cls): value for name, value in options.items()}
        return {**super().get_config(), **dark}

    @property
    def attention_layers(self) -> list[Any]:
        """The attention layers of all blocks."""
        return [self.family.attention_of(block) for block in self.transformer_layers]

    @property
    def dark_layers(self) -> list[Any]:
        """The attention layers that were converted."""
        layers = self.attention_layers
        return [layers[index] for index in self.dark_options.layer_indices]


def warn_of_dropped(model: Any) -> None:
    """Warns of all that a conversion of a task or backbone, once it is done, has dropped."""
    backbone = getattr(model, "backbone", model)
    for drop in backbone.dropped():
        warnings.warn(
            f"Converting {backbone.name!r} drops from layers {drop['layers']}: "
            f"{drop['what']}. {drop['why']}",
            stacklevel=3,
        )


def _pass_on_padding_mask(block: Any, family: Family) -> None:
    """Has a decoder block hand the padding mask to attention as it is.

    The stock block first makes a (b, t, t) mask of it. The method is replaced
    on the instance: a subclass with another name could not read stock
    weights, whose keys come from class names.
    """
    block.autocast = False  # or a recurrent state would arrive in half precision
    if family.mask_method is None:
        return
    stock = getattr(block, family.mask_method)
    attention = family.attention_of(block)
    parameters = list(inspect.signature(stock).parameters)
    place = parameters.index(family.padding_argument)

    def compute_mask(*args: Any, **kwargs: Any) -> Any:
        if attention.attention_mode == "exact":
            return stock(*args, **kwargs)
        named = family.padding_argument in kwargs
        mask = kwargs[family.padding_argument] if named else args[place]
        if mask is None or family.mask_axis is None:
            return mask
        return ops.expand_dims(mask, axis=family.mask_axis)

    setattr(block, family.mask_method, compute_mask)
