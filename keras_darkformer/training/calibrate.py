"""Calibration: one pass over data fits every layer's features to its queries and keys."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_darkformer.calibration.far_mass import FarMass
from keras_darkformer.calibration.feature_maps import CalibrationOptions, fit_feature_map
from keras_darkformer.calibration.sample import LayerStatistics
from keras_darkformer.checks import positive_integer
from keras_darkformer.compiling import compile_anew
from keras_darkformer.layers.observation import Observation, observed
from keras_darkformer.training.data import (
    batches,
    check_position_offset,
    dark_layers,
    position_offsets,
    run,
)

Kept = list[tuple[Any, int | None]]


def calibrate(
    model: Any,
    data: Any,
    *,
    method: str = "spectral",
    proposal: str | None = None,
    center: bool | None = None,
    refine: bool = True,
    budget: str = "uniform",
    max_tokens: int = 4096,
    position_offset: int | tuple[int, int] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    verbose: bool = True,
) -> Any:
    """Fits the feature maps of a model to its queries and keys, in one pass over data.

    Every layer computes exact softmax attention during the pass, so each sees
    what it sees in the model before conversion. Moments are summed up as
    batches go by; where a method needs queries and keys themselves, a sample
    of whole sequences is kept. Memory does not grow with the data.

    Geometry, proposal, shifts and projections of every dark layer are set; they
    are weights, saved and loaded with the model. A far part behind a sliding
    window gets its offset.

    Args:
        model: made by `convert_to_dark`, or any Keras model with
            `DarkAttention` layers. If it is compiled, it is compiled again
            with the same arguments and a fresh optimizer.
        data: strings (for a task with a preprocessor), arrays or a dict of
            arrays, or an iterable of batches, as `fit` takes them. A few
            thousand tokens of the text the model will see do.
        method: how each map is fitted; see `DarkFeatureMap.calibrate`.
            `"auto"` chooses per layer by held-out error.
        proposal, center, refine, budget: see `DarkFeatureMap.calibrate`.
        max_tokens: int. Tokens per layer in the sample, whole sequences.
        position_offset: positions the model will serve: the first token of
            each batch gets a random position up to this, or between a pair
            of them. Rotated keys differ by position, and what was not seen
            here is not fitted. `None` starts every batch at 0.
        batch_size: int. For data that does not come in batches.
        seed: int. Of draws, of the sample and of the offsets.
        verbose: bool. Shows a progress bar.

    Returns:
        The model, which is calibrated in place.

    Raises:
        ValueError: if an argument is out of range, the model has no dark
            layers, `data` has no batches, or queries or keys are not finite.
            No layer has then been changed.

    Example:

        model = convert_to_dark(GemmaCausalLM.from_preset("gemma_2b_en"))
        calibrate(model, texts, position_offset=8192)

    References:
        - [Data-Aware Random Feature Kernel for Transformers](https://arxiv.org/abs/2603.04127)
    """
    options = CalibrationOptions(
        method=method,
        proposal=proposal,
        center=center,
        refine=refine,
        budget=budget,
        seed=seed,
    )
    positive_integer("max_tokens", max_tokens)
    layers = dark_layers(model)
    check_position_offset(position_offset, layers.values())
    for layer in layers.values():
        options.check(layer.feature_map)
    statistics = {
        id(layer): LayerStatistics(
            layer.feature_map, options.needs_sample(layer.feature_map), max_tokens, seed
        )
        for layer in layers.values()
    }
    window = max(layer.feature_map.sliding_window or 0 for layer in layers.values())
    longest = 0
    kept: Kept = []
    progress = keras.utils.Progbar(None, verbose=int(verbose), unit_name="batch")
    offsets = position_offsets(position_offset, seed)
    for count, inputs in enumerate(batches(model, data, batch_size)):
        if not count:
            _probe_layouts(model, layers, statistics, inputs)
        offset = next(offsets)
        length = _look(model, layers, statistics, inputs, offset)
        longest = max(longest, length)
        if window and length > window and _tokens(kept) < max_tokens:
            kept.append((inputs, offset))
        progress.update(count + 1)
    progress.update(count + 1, finalize=True)
    if window:
        _check_length(longest, window)
    fits = _fit(layers, statistics, options, verbose)
    # All fits before any layer is changed: a failure leaves the model as it was.
    before = _structure(layers)
    for layer, fitted in zip(layers.values(), fits, strict=True):
        fitted.assign(layer.feature_map)
    if window:
        _fit_far_offsets(model, layers, kept)
    if before != _structure(layers):
        compile_anew(model)
    return model


def _structure(layers: dict[str, Any]) -> list[tuple[str, int]]:
    """What decides which weights there are."""
    maps = (layer.feature_map for layer in layers.values())
    return [(feature_map.form, feature_map.num_features) for feature_map in maps]


def _look(
    model: Any,
    layers: dict[str, Any],
    statistics: dict[int, LayerStatistics],
    inputs: Any,
    offset: int | None,
) -> int:
    """Adds a batch to the statistics of all layers; returns the length of its longest sequence."""
    lengths = []

    def observer(layer: Any, observation: Observation) -> Any:
        of_layer = statistics[id(layer)]
        query, key = map(_numpy, (observation.query, observation.key))
        key_mask = None if observation.key_mask is None else _numpy(observation.key_mask)
        query_mask = key_mask if query.shape[1] == key.shape[1] else None
        lengths.append(key.shape[1] if key_mask is None else int(key_mask.sum(axis=1).max()))
        masks = {"query_mask": query_mask, "key_mask": key_mask}
        of_layer.update(query, key, **masks, causal=observation.causal)
        if of_layer.needs_unrotated:
            unrotated = observation.unrotated_query, observation.unrotated_key
            query, key = map(_numpy, unrotated)
            of_layer.update_unrotated(query, key, **masks)
        return observation.exact_output()

    with observed(layers.values(), observer, offset):
        run(model, inputs)
    return max(lengths)


def _probe_layouts(
    model: Any, layers: dict[str, Any], statistics: dict[int, LayerStatistics], inputs: Any
) -> None:
    """Finds out where rotations put coordinates, for the layers that need to know."""
    probed = [layer for layer in layers.values() if statistics[id(layer)].needs_layout]

    def observer(layer: Any, observation: Observation) -> Any:
        def rotate_first(vector: np.ndarray) -> np.ndarray:
            probe = np.zeros(tuple(observation.unrotated_key.shape), "float32")
            probe[:, 0, :] = vector
            return _numpy(observation.rotate_key(ops.convert_to_tensor(probe)))[0, 0, 0]

        statistics[id(layer)].probe_layout(rotate_first)
        return observation.exact_output()

    if probed:
        with observed(probed, observer):
            run(model, inputs)


def _fit(
    layers: dict[str, Any],
    statistics: dict[int, LayerStatistics],
    options: CalibrationOptions,
    verbose: bool,
) -> list[Any]:
    progress = keras.utils.Progbar(len(layers), verbose=int(verbose), unit_name="layer")
    fits = []
    for number, (name, layer) in enumerate(layers.items()):
        try:
            fits.append(
                fit_feature_map(layer.feature_map, statistics[id(layer)], options.of_layer(number))
            )
        except ValueError as error:
            raise ValueError(f"{name} can't be calibrated. {error}") from error
        progress.update(number + 1)
    return fits


def _fit_far_offsets(model: Any, layers: dict[str, Any], kept: Kept) -> None:
    """Another look at some batches, with the fitted features, for the far parts' scale."""
    windowed = [layer for layer in layers.values() if layer.feature_map.sliding_window]
    masses = {id(layer): FarMass(layer.feature_map) for layer in windowed}

    def observer(layer: Any, observation: Observation) -> Any:
        masses[id(layer)].add(
            observation.query,
            observation.key,
            *observation.for_features(layer.feature_map),
            key_mask=observation.key_mask,
            attention_mask=observation.attention_mask,
        )
        return observation.exact_output()

    for layer in windowed:
        layer.feature_map.far_offset.assign(ops.zeros(layer.feature_map.far_offset.shape))
    for inputs, offset in kept:
        with observed(windowed, observer, offset):
            run(model, inputs)
    for layer in windowed:
        layer.feature_map.far_offset.assign(masses[id(layer)].offset())


def _tokens(kept: Kept) -> int:
    return sum(math.prod(keras.tree.flatten(inputs)[0].shape[:2]) for inputs, _ in kept)


def _check_length(longest: int, window: int) -> None:
    if longest <= window:
        raise ValueError(
            f"`data` must have sequences longer than the sliding window of {window} tokens, or "
            f"there is nothing behind it to fit. Received: {longest} tokens at most"
        )


def _numpy(x: Any) -> np.ndarray:
    dtype = keras.backend.standardize_dtype(x.dtype)
    return ops.convert_to_numpy(x if dtype == "bool" else ops.cast(x, "float32"))
