"""Backbones of which some or all layers attend in linear time."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import keras
from keras_hub.models import Gemma3Backbone, GemmaBackbone
from keras_hub.src.utils.preset_utils import get_preset_loader

from keras_darkformer.compiling import compile_anew
from keras_darkformer.hub.attention import (
    DarkCachedAttention,
    DarkGemma3Attention,
    DarkGemmaAttention,
    layer_seed,
)
from keras_darkformer.hub.options import DarkOptions, Mixin


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
            return cls.take_over(stock, options)
        if dark:
            raise ValueError(
                f"Preset {preset!r} is dark already and is loaded as it was saved. Arguments of "
                f"the conversion go with stock presets only. Received: {sorted(dark)}"
            )
        return super().from_preset(preset, load_weights, **others)


class DarkBackbone(PresetLoading):
    """Turns a KerasHub backbone, its base class in Python, dark.

    Attributes:
        attention_cls: what its attention layers become.
        dark_options: `DarkOptions`, resolved.
    """

    attention_cls: type[DarkCachedAttention]

    def __init__(
        self,
        *args: Any,
        num_features: Any = 256,
        layers: Any = "global",
        attention_mode: str = "linear",
        geometry_scale: float | None = None,
        train_geometry: bool = True,
        train_projection: bool = False,
        projection: str = "orthogonal",
        tie_geometry: bool = True,
        rope_geometry: str = "after",
        sliding_window: int | None = None,
        window_only: bool = False,
        feature_forms: Any = None,
        chunk_size: int | None = None,
        remat: bool | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        options = DarkOptions(
            num_features=num_features,
            layers=layers,
            attention_mode=attention_mode,
            geometry_scale=geometry_scale,
            train_geometry=train_geometry,
            train_projection=train_projection,
            projection=projection,
            tie_geometry=tie_geometry,
            rope_geometry=rope_geometry,
            sliding_window=sliding_window,
            window_only=window_only,
            feature_forms=feature_forms,
            chunk_size=chunk_size,
            remat=remat,
            seed=seed,
        )
        super().__init__(*args, **kwargs)
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
        compile_anew(backbone)
        for drop in backbone.dropped():
            warnings.warn(
                f"Converting {backbone.name!r} drops from layers {drop['layers']}: "
                f"{drop['what']}. {drop['why']}",
                stacklevel=3,
            )
        return backbone

    @classmethod
    def check_expressible(cls, backbone: Any) -> None:
        """Raises a ValueError with the reason if the backbone can't be converted."""

    @classmethod
    def _resolve(cls, backbone: Any, options: DarkOptions) -> DarkOptions:
        cls.check_expressible(backbone)
        is_local = [
            bool(block.use_sliding_window_attention) for block in backbone.transformer_layers
        ]
        return options.resolve(is_local, backbone.head_dim)

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
            self.attention_cls.take_over(block.attention, of_layer, form)
            _pass_on_padding_mask(block)
        self.dark_options = options

    def dropped(self) -> list[dict[str, Any]]:
        """What the converted layers no longer do: dicts of `what`, `why` and `layers`."""
        found: dict[tuple[str, str], list[int]] = {}
        linear = self.dark_options.attention_mode == "linear"
        for index in self.dark_options.layer_indices:
            block = self.transformer_layers[index]
            if block.logit_soft_cap is not None:
                what = f"soft cap of the attention logits at {block.logit_soft_cap}"
                why = "A bounded logit is no dark kernel."
                found.setdefault((what, why), []).append(index)
            if linear and block.use_sliding_window_attention:
                what = f"sliding window of {block.sliding_window_size} tokens"
                why = "Features sum over all the past; these layers now see all of it."
                found.setdefault((what, why), []).append(index)
            if linear and block.dropout:
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

    def get_config(self) -> dict[str, Any]:
        """The stock backbone's config and the options of the conversion."""
        options = self.dark_options.get_config()
        # Calibration changes these.
        options["feature_forms"] = [layer.feature_map.form for layer in self.dark_layers]
        counts = [layer.feature_map.num_features for layer in self.dark_layers]
        options["num_features"] = counts[0] if len(set(counts)) == 1 else counts
        return {**super().get_config(), **options}

    @property
    def dark_layers(self) -> list[Any]:
        """The attention layers that were converted."""
        return [
            self.transformer_layers[index].attention for index in self.dark_options.layer_indices
        ]


def _pass_on_padding_mask(block: Any) -> None:
    """Has a decoder block hand the padding mask to attention as it is.

    The stock block first makes a (b, t, t) mask of it. The method is replaced
    on the instance: a subclass with another name could not read stock
    weights, whose keys come from class names.
    """
    stock = block._compute_attention_mask

    def compute_attention_mask(x: Any, padding_mask: Any, *args: Any, **kwargs: Any) -> Any:
        if block.attention.attention_mode == "exact":
            return stock(x, padding_mask, *args, **kwargs)
        return padding_mask

    block._compute_attention_mask = compute_attention_mask
    block.autocast = False  # or a recurrent state would arrive in half precision


@keras.saving.register_keras_serializable(package="keras_darkformer")
class DarkGemmaBackbone(DarkBackbone, GemmaBackbone):
    """Gemma 1 or 2 whose layers attend in linear time.

    Args:
        num_features, layers, attention_mode, geometry_scale, train_geometry,
            train_projection, projection, tie_geometry, rope_geometry,
            sliding_window, window_only, chunk_size, remat, seed: as for
            `convert_to_dark`.
        feature_forms: forms of the converted layers' feature maps, what
            calibration made of them.
        *args, **kwargs: as for `keras_hub.models.GemmaBackbone`.

    Example:

    >>> backbone = keras_darkformer.hub.DarkGemmaBackbone(
    ...     vocabulary_size=256, num_layers=2, num_query_heads=2, num_key_value_heads=1,
    ...     hidden_dim=16, intermediate_dim=32, head_dim=8, num_features=32)
    >>> backbone({"token_ids": np.ones((1, 9)), "padding_mask": np.ones((1, 9))}).shape
    (1, 9, 16)
    """

    stock_cls = GemmaBackbone
    attention_cls = DarkGemmaAttention


@keras.saving.register_keras_serializable(package="keras_darkformer")
class DarkGemma3Backbone(DarkBackbone, Gemma3Backbone):
    """Gemma 3 (text) whose global layers attend in linear time.

    Args:
        num_features, layers, attention_mode, geometry_scale, train_geometry,
            train_projection, projection, tie_geometry, rope_geometry,
            sliding_window, window_only, chunk_size, remat, seed: as for
            `convert_to_dark`.
        feature_forms: forms of the converted layers' feature maps, what
            calibration made of them.
        *args, **kwargs: as for `keras_hub.models.Gemma3Backbone`.

    Example:

    >>> backbone = keras_darkformer.hub.DarkGemma3Backbone(
    ...     vocabulary_size=256, image_size=16, num_layers=6, num_query_heads=2,
    ...     num_key_value_heads=1, hidden_dim=16, intermediate_dim=32, head_dim=8,
    ...     use_sliding_window_attention=True, sliding_window_size=4, num_features=32)
    >>> backbone.dark_options.layers
    (5,)
    """

    stock_cls = Gemma3Backbone
    attention_cls = DarkGemma3Attention

    @classmethod
    def check_expressible(cls, backbone: Any) -> None:
        """Text only, causal only."""
        if not backbone.text_only_model:
            raise ValueError(
                "This Gemma 3 has a vision encoder: its image tokens attend to each other in "
                "both directions, which causal linear attention can't express. Text-only Gemma "
                "3 models can be converted."
            )
        if backbone.use_bidirectional_attention:
            raise ValueError(
                "This Gemma 3 attends in both directions (`use_bidirectional_attention=True`, an "
                "embedding model). Only causal Gemma 3 models can be converted."
            )
