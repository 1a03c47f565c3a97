"""Backbones of which some or all layers attend in linear time."""

import functools
import inspect
from typing import Any

from keras_darkformer.compiling import recompilations
from keras_darkformer.hub.family import Family
from keras_darkformer.hub.lora import LoraBackbone
from keras_darkformer.hub.private import forgotten, get_preset_loader, renumbered_lora_layers
from keras_darkformer.hub.record import Recorded, as_json
from keras_darkformer.hub.towers import Tower
from keras_darkformer.hub.transformers import TransformersExport, warn_of_misread
from keras_darkformer.layers.core import FeatureAttention
from keras_darkformer.layers.feature_maps import BY_KIND
from keras_darkformer.layers.feature_maps.placement import placement_of
from keras_darkformer.layers.feature_maps.weights import CheckedWeights
from keras_darkformer.memory import Memory
from keras_darkformer.options import ConversionOptions
from keras_darkformer.surgery.become import Mixin, become, put, undone_on_error
from keras_darkformer.surgery.report import WEIGHT_DROPOUT, warn_of_dropped
from keras_darkformer.types import Config, Layer, Model


class PresetLoading(CheckedWeights, Mixin):
    """`from_preset` of a dark class, for dark presets and for stock ones.

    Attributes:
        stock_cls: the KerasHub class that the dark one extends.
    """

    stock_cls: Any

    @classmethod
    def from_preset(cls, preset: str, load_weights: bool = True, **kwargs: Any) -> Any:
        """Loads a dark preset as it is, or loads a stock preset and converts it.

        Args:
            preset: as for the stock class: a name such as `"gemma_2b_en"` or `"hf://user/name"`, a
                directory that `save_to_preset` wrote, or one in the Hugging Face layout.
            load_weights: bool. Whether to load the weights, or leave them at random.
            **kwargs: for a stock preset, the options of `ConversionOptions`; all others, such as
                `dtype`, go to KerasHub.

        Returns:
            The dark model or backbone.

        Raises:
            ValueError: if conversion options are given for a dark preset, which has its own, the
                preset holds a model of another class, or the model can't be converted.

        Warns:
            UserWarning: as `convert_to_dark` does, and for what KerasHub leaves out of a checkpoint
                in the Hugging Face layout.

        Example:

            model = keras_darkformer.hub.DarkGemmaCausalLM.from_preset(
                "gemma_2b_en", num_features=256)
        """
        dark, others = ConversionOptions.split(kwargs)
        loader = get_preset_loader(preset)
        found = loader.check_backbone_class()
        if not issubclass(found, DarkBackbone):
            expected = getattr(cls, "backbone_cls", cls).stock_cls
            if found is not expected:
                raise ValueError(
                    f"Preset {preset!r} has a {found.__name__}, but {cls.__name__} needs a "
                    f"{expected.__name__}. Call `from_preset` of the dark class for that family, "
                    "or load the model with keras_hub and pass it to `convert_to_dark`."
                )
            options = ConversionOptions(**dark)
            stock = cls.stock_cls.from_preset(preset, load_weights, **others)
            warn_of_misread(preset, loader.config, getattr(stock, "backbone", stock))
            return convert(stock, cls, options)
        if dark:
            raise ValueError(
                f"Preset {preset!r} is dark already and is loaded as it was saved. Conversion "
                f"options are for stock presets only. Received: {sorted(dark)}"
            )
        return super().from_preset(preset, load_weights, **others)


class DarkBackbone(LoraBackbone, PresetLoading, Recorded, TransformersExport):
    """Mixin that makes a KerasHub backbone dark.

    Attributes:
        family: the `Family` or `Tower` that this backbone belongs to.
        stock_cls: the KerasHub class that this one extends.
        options: `ConversionOptions`, resolved.
    """

    family: Family | Tower
    options: ConversionOptions

    def __init__(self, *args: Any, linearization: Config | None = None, **kwargs: Any) -> None:
        names = option_names(self.stock_cls)
        dark = {names[name]: kwargs.pop(name) for name in list(kwargs) if name in names}
        options = ConversionOptions(**dark)
        super().__init__(*args, **kwargs)
        self._darken(self._resolve(self, options))
        self.linearization = linearization

    @classmethod
    def take_over(cls, backbone: Model, options: ConversionOptions) -> Model:
        """Makes a stock backbone dark, in place, and returns it."""
        options = cls._resolve(backbone, options)
        become(backbone, cls)
        backbone._darken(options)
        if (numbers := renumbered_lora_layers(backbone)) is not None:
            put(backbone, _lora_enabled_layers=numbers)
        return backbone

    @classmethod
    def _resolve(cls, backbone: Model, options: ConversionOptions) -> ConversionOptions:
        """Checks the options against this backbone and resolves them."""
        family = cls.family
        if (reason := family.refuse(backbone)) is not None:
            raise ValueError(reason)
        if options.memory and not family.causal:
            raise ValueError(
                "`sliding_window` and `num_sinks` need causal attention, but "
                f"{family.name} attends in both directions. Received: {options.memory}"
            )
        placement = placement_of(options)
        if placement.needs_rotation and (family.rotary is None or not family.rotates_all):
            raise ValueError(
                f"`rope_geometry={placement.name!r}` needs rotary positions in every layer, which "
                f"{family.name} does not have."
            )
        layers = family.attention_layers(backbone)
        head_dim = family.head_sizes(layers[0])[2]
        options = options.resolve([family.window(x) is not None for x in layers], head_dim)
        for of_layer in options.by_layer().values():
            BY_KIND[of_layer.feature_map].check(of_layer, head_dim)
        return options

    def _darken(self, options: ConversionOptions) -> None:
        self.family.darken(self, options.by_layer())
        put(self, options=options)

    def dropped(self) -> list[dict[str, Any]]:
        """What the converted layers no longer do: dicts of `what`, `why` and `layers`."""
        found: dict[tuple[str, str], list[int]] = {}
        for index, layer in self.dark_layers.items():
            linear = layer.is_linear
            if (soft_cap := self.family.soft_cap(self, index)) is not None:
                what = f"soft cap of the attention logits at {soft_cap}"
                why = "A dark kernel can't bound its logits."
                found.setdefault((what, why), []).append(index)
            if linear and (window := self.family.window(layer)):
                what, memory = f"sliding window of {window} tokens", layer.feature_map.memory
                why = f"These layers now see a memory of their own: {memory}."
                has_features = layer.feature_map.num_features > 0
                if has_features:
                    why = "Features sum over all the past; these layers now see all of it."
                if has_features or memory != Memory(window):
                    found.setdefault((what, why), []).append(index)
            if linear and self.family.drops_weights(self, index):
                found.setdefault(WEIGHT_DROPOUT, []).append(index)
        return [{"what": what, "why": why, "layers": where} for (what, why), where in found.items()]

    def get_config(self) -> Config:
        """The stock backbone's config, the options of the conversion, and how it was fitted."""
        options = self.options.get_config()
        # Calibration may have put other feature maps into the layers.
        kinds = [layer.feature_map.kind for layer in self.dark_layers.values()]
        options["feature_map"] = kinds if len(set(kinds)) > 1 else kinds[0]
        dark = {name: options[option] for name, option in option_names(self.stock_cls).items()}
        if self.linearization is not None:
            dark["linearization"] = as_json(self.linearization)
        config = super().get_config()
        return config | forgotten(self.stock_cls, self, config) | dark

    @property
    def attention_layers(self) -> list[Layer]:
        """The attention layers of all blocks."""
        return self.family.attention_layers(self)

    @property
    def dark_layers(self) -> dict[int, FeatureAttention]:  # type: ignore[override]
        """The attention layers that were converted, by the indices of their blocks."""
        layers: Any = enumerate(self.attention_layers)
        return {index: x for index, x in layers if isinstance(x, FeatureAttention)}


def convert(model: Any, dark_cls: Any, options: ConversionOptions, like: Any = None) -> Any:
    """Makes a stock task or backbone dark, in place, and compiles it as it, or `like`, was.

    Other models that hold its layers are compiled again, too. On any error nothing is changed.

    Args:
        model: the stock model.
        dark_cls: the dark class it becomes.
        options: of the conversion.
        like: the model that this one is a copy of, or `None`.

    Returns:
        The model.
    """
    with undone_on_error():
        dark_cls.take_over(model, options)
        parts = _parts(model)
        backbone = parts[0]
        compile_anew = recompilations(
            parts, backbone.dark_layers.values(), like=None if like is None else _parts(like)
        )
        # Shown at the line that calls `convert_to_dark`.
        warn_of_dropped(backbone.name, backbone.dropped(), "layers", stacklevel=4)
    compile_anew()
    return model


def _parts(model: Any) -> list[Any]:
    """The backbone and, for a task, the task."""
    return [model.backbone, model] if hasattr(model, "backbone") else [model]


@functools.cache
def option_names(stock_cls: type) -> dict[str, str]:
    """The names of the conversion options among a stock class's arguments.

    Mistral, for example, has its own `sliding_window`, so ours is `dark_sliding_window` there.
    """
    taken = inspect.signature(stock_cls).parameters
    names = ConversionOptions.names()
    return {f"dark_{name}" if name in taken else name: name for name in names}
