"""Distillation: a converted causal LM learns the logits of the exact one, end to end."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_darkformer.checks import one_of, positive_integer
from keras_darkformer.training.data import Kept, KnownBatches, batches, dark_layers

TRAINABLE = ("qkv", "lora", "all", "feature_maps")


class TeacherTargets(NamedTuple):
    """What a teacher predicts for one batch.

    Attributes:
        token_ids: int32, `(b, t, k)`, the k likeliest next tokens; `None`
            where `log_probs` has all.
        log_probs: float32, `(b, t, k)`, their log-probabilities.
    """

    token_ids: Any
    log_probs: Any


def teacher_targets(
    teacher: Any, data: Any, *, top_k: int | None = 64, batch_size: int = 8
) -> Iterator[TeacherTargets]:
    """The likeliest next tokens of a model, to distil from without having it in memory.

    Write them down before converting the model in place, for the same data in
    the same order:

        targets = list(teacher_targets(model, texts))
        convert_to_dark(model)
        distil(model, targets, texts)

    Args:
        teacher: a causal LM.
        data: as for `calibrate`.
        top_k: int. Tokens kept per position; `None` for the whole vocabulary.
        batch_size: int. For data without batches.

    Yields:
        `TeacherTargets`, one a batch, as NumPy arrays.
    """
    if top_k is not None:
        positive_integer("top_k", top_k)
    for inputs in batches(teacher, data, batch_size):
        yield _targets(teacher, inputs, top_k)


def _targets(teacher: Any, inputs: Any, top_k: int | None) -> TeacherTargets:
    # Keras' own, for a KerasHub task would preprocess its inputs again.
    logits = np.asarray(keras.Model.predict_on_batch(teacher, inputs), "float32")
    if logits.ndim != 3:
        raise ValueError(
            "`teacher` must give logits of tokens, of shape `(b, t, vocabulary)`. Received: an "
            f"output of shape {logits.shape}. Finetune a classifier with `fit`."
        )
    logits -= logits.max(axis=-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    if top_k is None:
        return TeacherTargets(None, log_probs)
    top_k = min(top_k, log_probs.shape[-1])
    ids = np.argpartition(-log_probs, top_k - 1, axis=-1)[..., :top_k]
    return TeacherTargets(ids.astype("int32"), np.take_along_axis(log_probs, ids, axis=-1))


@keras.saving.register_keras_serializable(package="keras_darkformer")
class DistillationLoss(keras.losses.Loss):
    """Divergence from a teacher's next-token probabilities to the model's, in nats per token.

    Targets hold log-probabilities of the whole vocabulary, `(b, t, V)`; or, with
    `top_k`, of the likeliest tokens, `(b, t, 2 k)`: their ids, then their
    log-probabilities. All other tokens then count as one.

    Args:
        top_k: int, or `None`.
        **kwargs: as for `keras.losses.Loss`.
    """

    def __init__(
        self,
        top_k: int | None = None,
        reduction: str = "mean_with_sample_weight",
        name: str = "distillation_loss",
        **kwargs: Any,
    ) -> None:
        super().__init__(reduction=reduction, name=name, **kwargs)
        self.top_k = top_k

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """The divergence at every position, `(b, t)`."""
        ours = ops.log_softmax(ops.cast(y_pred, "float32"), axis=-1)
        targets = ops.cast(y_true, "float32")
        if self.top_k is None:
            return ops.sum(ops.exp(targets) * (targets - ours), axis=-1)
        top_k = min(self.top_k, y_pred.shape[-1])
        ids = ops.cast(targets[..., :top_k], "int32")
        targets = targets[..., top_k:]
        ours = ops.take_along_axis(ours, ids, axis=-1)
        near = ops.sum(ops.exp(targets) * (targets - ours), axis=-1)
        rest, our_rest = (
            ops.maximum(1.0 - ops.sum(ops.exp(x), axis=-1), 1e-6) for x in (targets, ours)
        )
        return near + rest * (ops.log(rest) - ops.log(our_rest))

    def get_config(self) -> dict[str, Any]:
        """All constructor arguments."""
        return {**super().get_config(), "top_k": self.top_k}


def distil(
    model: Any,
    teacher: Any,
    data: Any,
    *,
    steps: int = 300,
    train: str = "qkv",
    learning_rate: float = 1e-3,
    feature_map_learning_rate: float | None = None,
    optimizer: Any = None,
    top_k: int | None = None,
    batch_size: int = 8,
    validation_data: Any = None,
    callbacks: Any = None,
    verbose: Any = "auto",
) -> keras.callbacks.History:
    """Finetunes a converted causal LM end to end on the exact model's logits.

    A plain `fit` of the model on the loss `DistillationLoss`, so callbacks,
    optimisers, mixed precision and distribution work as ever. More telling
    than the next token alone: at every position the whole distribution says
    what exact attention would have said.

    Args:
        model: a dark causal LM; `calibrate` it and `transfer_attention` first.
        teacher: the exact causal LM, such as the model before conversion
            (`convert_to_dark(model, copy=True)` keeps it); or what
            `teacher_targets` gave for the same data, a sequence.
        data: as for `calibrate`; gone through again where it ends early.
        steps: int. Batches.
        train: what is trained beside the feature maps: `"qkv"`, the
            projections to queries, keys and values of the converted layers;
            `"lora"`, LoRA weights (call `enable_lora` first); `"all"`, every
            dense layer of the blocks; `"feature_maps"`, nothing else.
        learning_rate: float. Peak of a cosine schedule.
        feature_map_learning_rate: float. The feature maps' own, by the same
            schedule; `None` for three times `learning_rate`.
        optimizer: a `keras.optimizers.Optimizer` instead of AdamW with that
            schedule and gradients clipped to norm 1. Its rate is the dense
            layers'; feature maps learn faster by the ratio of the two rates.
        top_k: int. Distil from the teacher's likeliest tokens instead of the
            whole vocabulary: less memory.
        batch_size: int. For data without batches.
        validation_data: held-out data, as `data`, needs a model as teacher.
        callbacks: Keras callbacks.
        verbose: as for `keras.Model.fit`.

    Returns:
        The `History` of the fit. The model's own compile settings are restored,
        with a fresh optimizer.

    Raises:
        ValueError: if an argument is out of range, nothing is trainable, or
            data and the teacher's targets do not fit.

    Example:

        dark = convert_to_dark(model, copy=True)
        calibrate(dark, texts)
        transfer_attention(dark, texts)
        distil(dark, model, texts, steps=300)

    References:
        - [Distilling the Knowledge in a Neural Network](https://arxiv.org/abs/1503.02531)
    """
    steps = positive_integer("steps", steps)
    one_of("train", train, TRAINABLE)
    if top_k is not None:
        positive_integer("top_k", top_k)
    if teacher is model:
        raise ValueError(
            "`teacher` is the converted model itself. Convert a copy "
            "(`convert_to_dark(model, copy=True)`), or note `teacher_targets` down before."
        )
    is_model = isinstance(teacher, keras.Model)
    if not is_model:
        teacher = list(teacher)
        top_k = _cached_top_k(teacher)
        if validation_data is not None:
            raise ValueError("`validation_data` needs a model as `teacher`, not its targets.")
    layers = dark_layers(model)
    feature_variables = [v for x in layers.values() for v in x.feature_map.variables]
    if feature_map_learning_rate is None:
        feature_map_learning_rate = 3.0 * learning_rate
    if optimizer is None:
        schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
        optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.0, clipnorm=1.0)
    optimizer = with_learning_rate_ratio(
        optimizer, feature_variables, feature_map_learning_rate / learning_rate
    )
    before = _compile_settings(model)
    with _only_trainable(model, _chosen(model, layers, train)):
        examples = _examples(model, teacher, data, top_k, batch_size, repeat=True)
        held_out = None
        if validation_data is not None:
            known = list(_examples(model, teacher, validation_data, top_k, batch_size))
            held_out = KnownBatches(known)
        try:
            loss = DistillationLoss(top_k=top_k)
            model.compile(optimizer=optimizer, loss=loss, weighted_metrics=[])
            return keras.Model.fit(  # as above
                model,
                examples,
                shuffle=False,
                steps_per_epoch=steps,
                validation_data=held_out,
                callbacks=callbacks,
                verbose=verbose,
            )
        finally:
            _restore_compile(model, before)


def _cached_top_k(targets: list[TeacherTargets]) -> int | None:
    if not targets or not all(isinstance(x, TeacherTargets) for x in targets):
        raise ValueError(
            "`teacher` must be a model or what `teacher_targets` gave, one for each batch."
        )
    ids = targets[0].token_ids
    return None if ids is None else ids.shape[-1]


def _examples(
    model: Any,
    teacher: Any,
    data: Any,
    top_k: int | None,
    batch_size: int,
    repeat: bool = False,
) -> Iterator[Any]:
    """`(inputs, targets, weights)`; padding weighs nothing."""
    if repeat and isinstance(data, Iterator):
        data = Kept(data)
    while True:
        known: Iterator[Any] | None = None if isinstance(teacher, keras.Model) else iter(teacher)
        for inputs in batches(model, data, batch_size):
            targets = _targets(teacher, inputs, top_k) if known is None else next(known, None)
            shape, mask = _predictions(inputs)
            if targets is None or targets.log_probs.shape[:2] != shape:
                raise ValueError(
                    "`teacher` must hold the targets of every batch of `data`, in its order: one "
                    f"of shape {shape} has none that fits."
                )
            packed = targets.log_probs
            if targets.token_ids is not None:
                packed = np.concatenate([targets.token_ids.astype("float32"), packed], axis=-1)
            weights = np.ones(packed.shape[:2]) if mask is None else mask
            yield inputs, packed, np.asarray(weights, "float32")
        if not repeat:
            return


def _predictions(inputs: Any) -> tuple[Any, Any]:
    """The shape of what is predicted, and which of it counts, or `None` for all."""
    if isinstance(inputs, dict) and "mask_positions" in inputs:  # of a masked LM
        return inputs["mask_positions"].shape[:2], None
    mask = inputs.get("padding_mask") if isinstance(inputs, dict) else None
    return keras.tree.flatten(inputs)[0].shape[:2], mask


def _chosen(model: Any, layers: dict[str, Any], train: str) -> list[Any]:
    """The variables that are to be trained."""
    chosen = [v for layer in layers.values() for v in layer.feature_map.trainable_variables]
    if train == "qkv":
        for layer in layers.values():
            for dense in layer.dense_layers():
                chosen += dense.variables
    elif train != "feature_maps":
        backbone = getattr(model, "backbone", model)
        dense_layers = [
            x
            for x in backbone._flatten_layers()
            if isinstance(x, keras.layers.Dense | keras.layers.EinsumDense)
        ]
        if train == "all":
            chosen += [v for dense in dense_layers for v in dense.variables]
        else:
            chosen += [
                v
                for dense in backbone._flatten_layers()
                if getattr(dense, "lora_enabled", False)
                for v in dense.trainable_variables
            ]
            if not any(getattr(x, "lora_enabled", False) for x in backbone._flatten_layers()):
                raise ValueError('`train="lora"` needs LoRA weights: call `enable_lora` first.')
    if not chosen:
        raise ValueError("Nothing is trainable: the feature maps are frozen.")
    return [v for v in chosen if "seed" not in v.path]


@contextlib.contextmanager
def _only_trainable(model: Any, variables: Iterable[Any]) -> Iterator[None]:
    """Freezes all other variables of a model; afterwards all is as it was."""
    chosen = {id(v) for v in variables}
    layers = [(layer, layer._trainable) for layer in model._flatten_layers(include_self=True)]
    before = [(v, v.trainable) for v in model.variables]
    for layer, _ in layers:
        layer._trainable = True
    for v, _ in before:
        v.trainable = id(v) in chosen
    try:
        yield
    finally:
        for layer, trainable in layers:
            layer._trainable = trainable
        for v, trainable in before:
            v.trainable = trainable


def _compile_settings(model: Any) -> dict[str, Any] | None:
    if not model.compiled:
        return None
    settings = dict(model._compile_config.config)
    if hasattr(model, "sampler"):
        settings["sampler"] = model.sampler
    return settings


def _restore_compile(model: Any, settings: dict[str, Any] | None) -> None:
    model.train_function = model.test_function = model.predict_function = None
    if settings is None:
        model.compiled, model.optimizer = False, None
    else:
        optimizer = settings.get("optimizer")
        if isinstance(optimizer, keras.optimizers.Optimizer):
            settings["optimizer"] = optimizer.__class__.from_config(optimizer.get_config())
        model.compile(**settings)


def with_learning_rate_ratio(optimizer: Any, variables: Iterable[Any], ratio: float) -> Any:
    """The optimizer, with `ratio` times its learning rate for some variables.

    Args:
        optimizer: a `keras.optimizers.Optimizer`, not used yet. It is changed.
        variables: those with a rate of their own.
        ratio: float.

    Returns:
        The optimizer.
    """
    if ratio == 1.0:
        return optimizer
    own_rate = {id(v) for v in variables}
    stock = optimizer._backend_update_step

    def update(gradients: Any, trained: Any, learning_rate: Any) -> None:
        for own in (False, True):
            pairs = [
                (g, v)
                for g, v in zip(gradients, trained, strict=True)
                if (id(v) in own_rate) is own
            ]
            if pairs:
                grads, some = zip(*pairs, strict=True)
                stock(list(grads), list(some), learning_rate * ratio if own else learning_rate)

    # A method on the instance: every optimizer, of any backend, has this one.
    optimizer._backend_update_step = update
    return optimizer
