"""Checkpoints in the layout of Hugging Face's `transformers`: warnings for import, and export."""

import warnings
from collections.abc import Iterator
from typing import Any

from keras_darkformer.surgery.become import Mixin, as_stock
from keras_darkformer.types import Config, Model


def warn_of_misread(preset: str, config: Config, backbone: Model) -> None:
    """Warns of what KerasHub's loader left out of a checkpoint, as far as its config shows.

    Args:
        preset: name or path of the checkpoint.
        config: contents of its `config.json`. KerasHub's own presets have none of the keys used.
        backbone: the loaded backbone.
    """
    for left_out in _misread(config, backbone):
        warnings.warn(f"KerasHub reads {preset!r} without {left_out}", stacklevel=3)


def _misread(config: Config, backbone: Any) -> Iterator[str]:
    epsilon, read = config.get("rms_norm_eps"), getattr(backbone, "layer_norm_epsilon", None)
    if None not in (epsilon, read) and epsilon != read:
        yield (
            f"its `rms_norm_eps={epsilon}`: the norms of this model use {read}. Load the backbone "
            f"by itself with `layer_norm_epsilon={epsilon}`, pass it to the stock task's "
            "`from_preset` as `backbone`, and convert that."
        )
    if biases := [name for name in ("attention_bias", "mlp_bias") if config.get(name)]:
        yield f"its biases ({', '.join(biases)}): this model computes something else."
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    factors = ("rope_frequency_adjustment_factor", "global_rope_scaling_factor")
    if kind != "default" and all(getattr(backbone, x, None) in (None, 1.0) for x in factors):
        yield (
            f"its rotary positions of type {kind!r}: this model's are not rescaled, and are "
            "wrong in long texts."
        )


class TransformersExport(Mixin):
    """Mixin that exports a dark backbone or causal LM, as a softmax model only.

    Attributes:
        stock_cls: the KerasHub class that the dark one extends.
    """

    stock_cls: Any

    def export_to_transformers(self, path: str, *, as_softmax: bool = False) -> None:
        """Exports the stock weights, without feature maps, in the Hugging Face layout.

        The layout knows no dark attention: whatever loads the folder, `transformers` or KerasHub,
        computes softmax with these weights. Weights that were trained with dark attention are worse
        there. To keep the model dark, save it with `save_to_preset`.

        Args:
            path: folder to write into, as for the stock model.
            as_softmax: bool. Must be `True`, to confirm this.

        Raises:
            ValueError: if `as_softmax` is not `True`, KerasHub's export would be wrong, or KerasHub
                can't export models of this family.
        """
        if as_softmax is not True:
            raise ValueError(
                f"{type(self).__name__} can't be exported as a dark model: the Hugging Face layout "
                "has no place for feature maps, and whatever loads it computes softmax. Save "
                "the dark model with `save_to_preset`, or pass `as_softmax=True` to export its "
                f"stock weights alone. Received: as_softmax={as_softmax!r}"
            )
        backbone: Any = getattr(self, "backbone", self)
        stock_cls = self.stock_cls
        if (reason := backbone.family.refuse_export(backbone)) is not None:
            raise ValueError(f"{type(self).__name__} can't be exported. {reason}")
        with as_stock(backbone):
            stock_cls.export_to_transformers(self, path)
