"""Calibration: one pass over data fits every layer's features to its queries and keys."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
from keras import ops
from threadpoolctl import threadpool_limits

from keras_darkformer.checks import positive_integer
from keras_darkformer.compiling import recompilations
from keras_darkformer.fitting import CalibrationOptions, Fit, LayerStatistics
from keras_darkformer.layers.core import FeatureAttention, observed
from keras_darkformer.layers.feature_maps.far_offset import FarMass
from keras_darkformer.layers.heads import Heads
from keras_darkformer.progress import Progress
from keras_darkformer.training.data import (
    batches,
    check_position_offset,
    dark_layers,
    layers_with_features,
    look,
    position_offsets,
)
from keras_darkformer.types import Data, Model, Tensor

Kept = list[tuple[Data, int | None]]

# Tokens that one number per head is found in. Each query meets every key there, which is slow.
FAR_TOKENS = 2048


def calibrate(
    model: Model,
    data: Data,
    *,
    method: str = "spectral",
    proposal: str | None = None,
    center: bool | None = None,
    refine: bool = True,
    max_tokens: int = 4096,
    position_offset: int | tuple[int, int] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    verbose: bool = True,
) -> Model:
    """Fits the feature maps of a model to its queries and keys, in one pass over data.

    Every layer computes exact softmax attention during the pass, so each gets the inputs it had
    before the conversion. Moments are summed up batch by batch. If a method needs the queries and
    keys themselves, a sample of whole sequences is kept. Memory does not grow with the data.

    Calibration sets the geometry, proposal, shifts and projections of every dark layer with
    features. These are weights, saved and loaded with the model. Beside an exact memory it also
    sets the far offset. Clusters replace the layer's feature map with one of another class, which
    has other weights.

    Args:
        model: a model made by `convert_to_dark`, or any Keras model that holds such a model, layers
            of it or `DarkAttention` at any depth. If it is compiled and a feature map is replaced
            with one of another class, it is compiled again with the same arguments and a fresh
            optimizer, and a message says so. Other models that hold its layers are compiled again,
            too.
        data: strings or bytes in a list or an array (for a task with a preprocessor), arrays or a
            dict of arrays, or an iterable of batches or of single strings, as `fit` takes them. A
            few thousand tokens like those the model will see are enough.
        method: how each map is fitted:

            | `method` | what it sets |
            | --- | --- |
            | `"identity"` | M = I: Performer |
            | `"scale"` | M = alpha I, with an alpha that m features can estimate |
            | `"whitening"` | M = h^(-1/4) L^(-1/2), L the pooled covariance: proposition C.1 |
            | `"spectral"` | M = diag(a) U': features go where the logits come from |
            | `"clusters"` | an `ExponentialFeatureMap`, fitted to a k-means of the queries |
            | `"auto"` | for each layer, whichever has the lowest error at held-out positions |

        proposal: the distribution of the rows of W. Its density ratio keeps the kernel the same.
            `"none"` is N(0, I), `"variance_optimal"` that of the paper's theorem 3.2, and
            `"spectral"` the minimiser of a bound, which always exists. `None` uses the method's
            own: `"spectral"` for scale and spectral, otherwise `"none"`.
        center: bool. Whether the means of queries and keys are taken off, and put back exactly.
            `None` uses the method's own: true for scale and spectral. Clusters always centre.
        refine: bool. Spectral then keeps the best of several draws, and fits M and a weight per
            feature to the sample by a short descent on the KL divergence. Clusters are refined by
            such a descent, too. False keeps the closed forms.
        max_tokens: int. Tokens per layer in the sample of whole sequences.
        position_offset: int, or a pair of ints. The positions the model will serve: the first token
            of each batch gets a random position up to this, or between the two. Rotated keys depend
            on their positions, and unseen positions are not fitted. `None` starts every batch at 0.
        batch_size: int. Rows per batch of data that does not come in batches.
        seed: int. Seed of the draws, the sample and the offsets.
        verbose: bool. Whether to show progress: a line that is overwritten, or in a file a line now
            and then.

    Returns:
        The model, which is calibrated in place.

    Raises:
        ValueError: if an argument is out of range, the model has no dark layers or none with
            features, `data` has no batches, queries or keys are not finite, or the model must be
            compiled again and its optimizer can't be rebuilt. After any error all feature maps are
            as they were.

    Example:

        model = convert_to_dark(GemmaCausalLM.from_preset("gemma_2b_en"))
        calibrate(model, texts, position_offset=8192)

    References:
        - [Data-Aware Random Feature Kernel for Transformers](https://arxiv.org/abs/2603.04127)
        - [Dense-Exponential Random Features](https://arxiv.org/abs/2302.00787), the spectral
          proposal
    """
    options = CalibrationOptions(
        method=method, proposal=proposal, center=center, refine=refine, seed=seed
    )
    positive_integer("max_tokens", max_tokens)
    every_layer = dark_layers(model)
    check_position_offset(position_offset, every_layer.values())
    layers = layers_with_features(every_layer)
    for layer in layers.values():
        layer.feature_map.check_calibration(options)
    if method == "clusters":
        # Fails now rather than after the pass.
        _recompilation(model, [x for x in layers.values() if x.feature_map.kind != "exponential"])
    statistics = {
        id(layer): layer.feature_map.statistics(options, max_tokens) for layer in layers.values()
    }
    kept_exactly = max(layer.feature_map.memory.size for layer in layers.values())
    longest = 0
    kept: Kept = []
    progress = Progress("calibrate, looking", "batches", verbose=verbose)
    offsets = position_offsets(position_offset, seed)
    for count, inputs in enumerate(batches(model, data, batch_size)):
        if not count:
            _probe_layouts(model, layers, statistics, inputs)
        offset = next(offsets)
        length = _look(model, every_layer, statistics, inputs, offset)
        longest = max(longest, length)
        more = min(max_tokens, FAR_TOKENS) - _tokens(kept)
        if kept_exactly and length > kept_exactly and more > 0:
            kept.append((_longest_rows(inputs, more), offset))
        progress.update(count + 1)
    progress.finish()
    if kept_exactly:
        _check_length(longest, kept_exactly)
    fits = _fit(layers, statistics, options, verbose)
    pairs = list(zip(layers.values(), fits, strict=True))
    swapped = [layer for layer, fit in pairs if layer.feature_map.kind != fit.kind]
    compile_anew = _recompilation(model, swapped)
    with _put_back_on_error(layers):
        for layer, fit in pairs:
            layer.swap_feature_map(fit.kind)
            layer.feature_map.load(fit)
        if kept_exactly:
            _fit_far_offsets(model, every_layer, kept)
    if compile_anew is not None:
        _say_swapped(model, len(swapped), len(layers), verbose)
        compile_anew()
    return model


def _recompilation(model: Model, swapped: list[FeatureAttention]) -> Callable[[], None] | None:
    """Compiles again the models that hold layers whose maps are replaced; `None` if none are."""
    return recompilations([model], swapped) if swapped else None


@contextlib.contextmanager
def _put_back_on_error(layers: dict[str, FeatureAttention]) -> Iterator[None]:
    """Restores the feature maps of all layers if anything goes wrong."""
    maps = [
        (layer, layer.feature_map, layer.feature_map.get_weights()) for layer in layers.values()
    ]
    try:
        yield
    except BaseException:
        for layer, feature_map, weights in maps:
            if layer.feature_map is not feature_map:
                layer.put_feature_map(feature_map)
            feature_map.set_weights(weights)
        raise


def _say_swapped(model: Model, swapped: int, total: int, verbose: bool) -> None:
    if model.compiled and verbose:
        print(
            f"{swapped} of {total} feature maps are of another class now, with other weights: "
            f"{model.name!r} was compiled anew, with a fresh optimizer, and so were the models "
            "that hold its layers."
        )


def _look(
    model: Model,
    layers: dict[str, FeatureAttention],
    statistics: dict[int, LayerStatistics],
    inputs: Data,
    offset: int | None,
) -> int:
    """Adds a batch to the statistics of all layers; returns the length of its longest sequence."""
    lengths = []

    def observer(layer: FeatureAttention, heads: Heads) -> Tensor:
        if id(layer) not in statistics:
            return heads.exact_output()
        of_layer = statistics[id(layer)]
        query, key = map(_numpy, (heads.query, heads.key))
        key_mask = None if heads.key_mask is None else _numpy(heads.key_mask)
        query_mask = key_mask if query.shape[1] == key.shape[1] else None
        lengths.append(key.shape[1] if key_mask is None else int(key_mask.sum(axis=1).max()))
        masks = {"query_mask": query_mask, "key_mask": key_mask}
        of_layer.update(query, key, **masks, causal=heads.causal)
        if of_layer.needs_unrotated:
            unrotated = heads.unrotated_query, heads.unrotated_key
            query, key = map(_numpy, unrotated)
            of_layer.update_unrotated(query, key, **masks)
        return heads.exact_output()

    with observed(layers.values(), observer, offset):
        look(model, inputs)
    return max(lengths, default=0)


def _probe_layouts(
    model: Model,
    layers: dict[str, FeatureAttention],
    statistics: dict[int, LayerStatistics],
    inputs: Data,
) -> None:
    """Finds out where rotations put coordinates, for the layers that need to know."""
    probed = [layer for layer in layers.values() if statistics[id(layer)].needs_unrotated]

    def observer(layer: FeatureAttention, heads: Heads) -> Tensor:
        def rotate_first(vector: np.ndarray) -> np.ndarray:
            probe = np.zeros(tuple(heads.unrotated_key.shape), "float32")
            probe[:, 0, :] = vector
            return _numpy(heads.rotate_key(ops.convert_to_tensor(probe)))[0, 0, 0]

        statistics[id(layer)].probe_layout(rotate_first)
        return heads.exact_output()

    if probed:
        with observed(probed, observer):
            look(model, inputs)


def _fit(
    layers: dict[str, FeatureAttention],
    statistics: dict[int, LayerStatistics],
    options: CalibrationOptions,
    verbose: bool,
) -> list[Fit]:
    """Fits the layers one by one, as many at a time as there are processors."""
    progress = Progress("calibrate, fitting", "layers", len(layers), verbose=verbose)

    def fit(number: int, name: str, layer: FeatureAttention) -> Fit:
        try:
            return layer.feature_map.fit(statistics[id(layer)], options.of_layer(number))
        except ValueError as error:
            raise ValueError(f"{name} can't be calibrated. {error}") from error

    fits: list[Fit] = []
    # With threads of its own, BLAS would have every small product wait for all processors.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(fit, range(len(layers)), layers, layers.values()):
            fits.append(found)
            progress.update(len(fits))
    progress.finish()
    return fits


def _fit_far_offsets(model: Model, layers: dict[str, FeatureAttention], kept: Kept) -> None:
    """Runs some batches again, with the fitted features, for the scale of the far parts."""
    masses = {
        id(layer): FarMass(layer.feature_map)
        for layer in layers_with_features(layers).values()
        if layer.feature_map.memory
    }

    def observer(layer: FeatureAttention, heads: Heads) -> Tensor:
        if id(layer) in masses:
            masses[id(layer)].add(
                heads.query,
                heads.key,
                *heads.for_features(layer.feature_map),
                key_mask=heads.key_mask,
                attention_mask=heads.attention_mask,
            )
        return heads.exact_output()

    for inputs, offset in kept:
        with observed(layers.values(), observer, offset):
            look(model, inputs)
    for mass in masses.values():
        mass.map.far_offset.assign(mass.offset())


def _longest_rows(inputs: Data, tokens: int) -> Data:
    """The rows of a batch with the least padding: as many as make `tokens`, at least one."""
    count, length = keras.tree.flatten(inputs)[0].shape[:2]
    order = np.arange(count)
    if isinstance(inputs, Mapping) and "padding_mask" in inputs:
        order = np.argsort(-(inputs["padding_mask"] != 0).sum(axis=1), kind="stable")
    rows = np.sort(order[: max(1, tokens // length)])
    return keras.tree.map_structure(lambda x: x[rows], inputs)


def _tokens(kept: Kept) -> int:
    return sum(math.prod(keras.tree.flatten(inputs)[0].shape[:2]) for inputs, _ in kept)


def _check_length(longest: int, kept_exactly: int) -> None:
    if longest <= kept_exactly:
        raise ValueError(
            f"`data` must have sequences longer than the {kept_exactly} tokens that are kept "
            f"exactly, or there is nothing else to fit. Received: {longest} tokens at most"
        )


def _numpy(x: Tensor) -> np.ndarray:
    dtype = keras.backend.standardize_dtype(x.dtype)
    return ops.convert_to_numpy(x if dtype == "bool" else ops.cast(x, "float32"))
