"""Attention transfer: every layer's features learn that layer's own softmax."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_darkformer.checks import positive_integer
from keras_darkformer.compiling import knows_variables, made_anew
from keras_darkformer.layers.core import FeatureAttention, observed
from keras_darkformer.layers.feature_maps import FeatureMap
from keras_darkformer.layers.heads import Heads
from keras_darkformer.ops.scores import exact_logits, log_softmax
from keras_darkformer.training.callbacks import RedrawProjections
from keras_darkformer.training.data import (
    Kept,
    batches,
    check_position_offset,
    dark_layers,
    layers_with_features,
    position_offsets,
    run,
)
from keras_darkformer.training.loop import fit_steps
from keras_darkformer.training.optimizers import warm_cosine
from keras_darkformer.types import Data, Model, Tensor


def transfer_attention(
    model: Model,
    data: Data,
    *,
    steps: int = 100,
    learning_rate: float = 3e-3,
    optimizer: Any = None,
    redraw: bool = False,
    position_offset: int | tuple[int, int] | None = None,
    validation_data: Data = None,
    validate_every: int = 20,
    patience: int = 3,
    batch_size: int = 8,
    backup: str | Path | None = None,
    callbacks: Any = None,
    seed: int = 0,
    verbose: Any = "auto",
) -> keras.callbacks.History:
    """Trains the feature maps of a model, each against the exact softmax of its own layer.

    Training is teacher-forced: every layer computes exact attention and passes it on, so all layers
    get the inputs they had before the conversion, and all learn in one pass. Only feature maps are
    trained. The model itself is the teacher, so there is no second copy of the weights. The cost is
    quadratic in the length of the batches, like that of exact attention.

    The projections stay as drawn, so part of what is learned only makes up for these draws.
    `redraw=True` draws new ones after every step: it learns less, but what holds for any draw.

    Args:
        model: a model made by `convert_to_dark`, or one with `DarkAttention` layers; `calibrate` it
            first. Its `compile` settings stay.
        data: as for `calibrate`; repeated if it ends before `steps` do.
        steps: int. Training steps, of one batch each.
        learning_rate: float. Peak of a schedule that warms up over the first tenth of the steps and
            then decays by a cosine.
        optimizer: a `keras.optimizers.Optimizer`, used instead of Adam with that schedule and
            gradients clipped to norm 1. One that is built, or that the model is compiled with, is
            not changed: a new optimizer gets its settings.
        redraw: bool. Whether to redraw the projections after every step.
        position_offset: as for `calibrate`.
        validation_data: held-out data, as `data`. The weights with the lowest loss on it are kept,
            and training stops after `patience` validations without a lower one.
        validate_every: int. Steps between validations.
        patience: int. Validations without a lower loss, after which training stops.
        batch_size: int. Rows per batch of data that does not come in batches.
        backup: path of a file that keeps the feature maps and the optimizer, written every
            `validate_every` steps. If the fit is interrupted, the same call with the same file,
            data and settings continues it, to the same result.
        callbacks: list of Keras callbacks for the fit.
        seed: int. Seed of the position offsets and the redraws.
        verbose: 0 or `False` shows nothing, 2 Keras' line per epoch. Anything else shows progress:
            a line that is overwritten, or in a file a line now and then.

    Returns:
        The `History` of the fit: the mean loss and that of each layer, per epoch of
        `validate_every` steps.

    Raises:
        ValueError: if an argument is out of range, the model has no dark layer with features or
            none whose feature map is trainable, or `backup` is damaged or from another fit.

    Example:

        calibrate(model, texts)
        transfer_attention(model, texts, steps=100, validation_data=held_out)

    References:
        - [LoLCATs](https://arxiv.org/abs/2410.10254), attention transfer
        - [The Hedgehog & the Porcupine](https://arxiv.org/abs/2402.04347)
    """
    transfer = AttentionTransfer(model)
    check_position_offset(position_offset, transfer.dark_layers.values())
    if optimizer is None:
        schedule = warm_cosine(learning_rate, positive_integer("steps", steps))
        optimizer = keras.optimizers.Adam(schedule, clipnorm=1.0)
    elif knows_variables(optimizer, model):
        optimizer = made_anew(optimizer)
    transfer.compile(optimizer=optimizer)
    callbacks = list(callbacks or ())
    if redraw:
        callbacks.append(RedrawProjections(every=1, seed=seed, model=model))
    held_out = None
    if validation_data is not None:
        held_out = list(_with_offsets(model, validation_data, batch_size, position_offset, seed))
    return fit_steps(
        transfer,
        list(transfer.dark_layers.values()),
        _with_offsets(model, data, batch_size, position_offset, seed, repeat=True),
        held_out,
        steps=steps,
        validate_every=validate_every,
        patience=patience,
        backup=backup,
        callbacks=callbacks,
        verbose=verbose,
    )


def _with_offsets(
    model: Model,
    data: Data,
    batch_size: int,
    position_offset: Any,
    seed: int,
    repeat: bool = False,
) -> Iterator[Any]:
    """Batches as `AttentionTransfer` takes them, without end if `repeat`."""
    offsets = position_offsets(position_offset, seed)
    if repeat and isinstance(data, Iterator):
        data = Kept(data)
    while True:
        for inputs in batches(model, data, batch_size):
            rows = len(keras.tree.flatten(inputs)[0])
            offset = np.full(rows, next(offsets) or 0, "int32")
            yield ({"inputs": inputs, "position_offset": offset},)
        if not repeat:
            return


class AttentionTransfer(keras.Model):
    """A model that outputs the loss of each of its dark attention layers.

    Args:
        model: the model with dark layers.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(name="transfer_attention")
        self.model = model
        self.dark_layers = dark_layers(model)
        fitted = layers_with_features(self.dark_layers)
        self.layer_losses = [keras.metrics.Mean(name=name) for name in fitted]
        if not self.trainable_variables:
            raise ValueError(
                "No feature map of `model` is trainable. Convert it with `train_geometry=True` "
                "(the default), and set `trainable = True` on feature maps that were frozen."
            )

    @property
    def trainable_variables(self) -> list[Tensor]:
        """The trainable variables of the feature maps."""
        maps = [layer.feature_map for layer in self.dark_layers.values()]
        return [v for feature_map in maps for v in feature_map.trainable_variables]

    @property
    def non_trainable_variables(self) -> list[Tensor]:
        """All other variables."""
        trained = {id(v) for v in self.trainable_variables}
        return [v for v in self.variables if id(v) not in trained]

    @property
    def trainable_weights(self) -> list[Tensor]:
        """As `trainable_variables`."""
        return self.trainable_variables

    @property
    def non_trainable_weights(self) -> list[Tensor]:
        """As `non_trainable_variables`."""
        return self.non_trainable_variables

    def call(self, inputs: Data, training: bool = False) -> Any:
        """The losses, of shape `(layers,)`."""
        losses = []

        def observer(layer: FeatureAttention, heads: Heads) -> Tensor:
            if layer.feature_map.num_features:
                losses.append(transfer_loss(layer.feature_map, heads))
            # Gradients end here: losses of later layers do not train this one.
            return ops.stop_gradient(heads.exact_output())

        offset = inputs["position_offset"][0]
        with observed(self.dark_layers.values(), observer, offset):
            run(self.model, inputs["inputs"])
        return ops.stack(losses)

    def compute_loss(
        self,
        x: Tensor = None,
        y: Tensor = None,
        y_pred: Tensor = None,
        sample_weight: Tensor = None,
        training: bool = True,
    ) -> Any:
        """The sum of the layers' losses. Each of them is also a metric."""
        for index, tracker in enumerate(self.layer_losses):
            tracker.update_state(y_pred[index])
        return ops.sum(y_pred)


def transfer_loss(feature_map: FeatureMap, heads: Heads) -> Tensor:
    """The divergence from exact attention weights to a feature map's: mean over queries and heads.

    Args:
        feature_map: a `FeatureMap`.
        heads: the inputs of the layer's attention. No gradient flows to queries and keys.

    Returns:
        A float32 scalar.
    """
    query, key = (
        ops.stop_gradient(ops.cast(x, "float32"))
        for x in (heads.unrotated_query, heads.unrotated_key)
    )
    heads = dataclasses.replace(heads, unrotated_query=query, unrotated_key=key)
    visible = heads.visible
    logits = exact_logits(heads.query, heads.key)
    exact = log_softmax(logits, visible)
    query, key = heads.for_features(feature_map)
    pairs = feature_map.exact_pairs(query, key, heads.key_mask)
    ours = log_softmax(feature_map.log_scores(query, key, pairs), visible)
    # Queries that see nothing, and padding, do not count.
    counts = ops.any(visible, axis=-1)
    if heads.key_mask is not None and query.shape[1] == key.shape[1]:
        counts = ops.logical_and(counts, ops.cast(heads.key_mask, "bool")[:, None, :])
    counts = ops.cast(ops.broadcast_to(counts, ops.shape(logits)[:3]), "float32")
    terms = ops.sum(ops.where(visible, ops.exp(exact) * (exact - ours), 0.0), axis=-1)
    return ops.sum(terms * counts) / ops.maximum(ops.sum(counts), 1.0)
