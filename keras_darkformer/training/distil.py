"""Distillation: a converted causal LM learns the logits of the exact one, end to end."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_darkformer.checks import one_of, positive_integer
from keras_darkformer.layers.core import fitted
from keras_darkformer.training.data import Kept, batches, dark_layers, without_head
from keras_darkformer.training.distillation import Distillation, Teacher
from keras_darkformer.training.distillation_loss import DistillationLoss
from keras_darkformer.training.loop import fit_steps
from keras_darkformer.training.optimizers import Optimizer, two_rates, warm_cosine
from keras_darkformer.types import Data, Layer, Model

TRAINABLE = ("qkv", "lora", "all", "feature_maps")


class TeacherTargets(NamedTuple):
    """A teacher's predictions for one batch.

    Attributes:
        token_ids: int32, `(b, t, k)`, the k likeliest next tokens; `None` if `log_probs` has all
            tokens.
        log_probs: float32, `(b, t, k)`, their log-probabilities.
    """

    token_ids: np.ndarray | None
    log_probs: np.ndarray


def teacher_targets(
    teacher: Model, data: Data, *, top_k: int | None = 64, batch_size: int = 8
) -> Iterator[TeacherTargets]:
    """Yields a model's likeliest next tokens, to distil from it without having it in memory.

    Compute them before converting the model in place, for the same data in the same order:

        targets = list(teacher_targets(model, texts))
        convert_to_dark(model)
        distil(model, targets, texts)

    The tokens are selected on the device.

    Args:
        teacher: a causal LM.
        data: as for `calibrate`.
        top_k: int. Tokens kept per position; `None` keeps the whole vocabulary, which takes four
            bytes per token of the vocabulary at every position.
        batch_size: int. Rows per batch of data that does not come in batches.

    Yields:
        `TeacherTargets` of NumPy arrays, one per batch.

    Raises:
        ValueError: if `top_k` is not a positive integer, `teacher` gives no logits of tokens, or
            `data` has no batches.
    """
    targets = Teacher(teacher, DistillationLoss(top_k))
    for inputs in batches(teacher, data, batch_size):
        found = targets.predict_on_batch(inputs)
        yield TeacherTargets(found.get("token_ids"), found["log_probs"])


def distil(
    model: Model,
    teacher: Model | Iterable[TeacherTargets],
    data: Data,
    *,
    steps: int = 300,
    train: str = "qkv",
    learning_rate: float = 3e-4,
    feature_map_learning_rate: float | None = None,
    optimizer: Optimizer | None = None,
    top_k: int | None = None,
    batch_size: int = 8,
    validation_data: Data | None = None,
    validate_every: int = 20,
    patience: int = 3,
    backup: str | Path | None = None,
    callbacks: Sequence[keras.callbacks.Callback] | None = None,
    verbose: str | int = "auto",
) -> keras.callbacks.History:
    """Finetunes a converted causal LM end to end on the exact model's logits.

    This tells the student more than the next token alone: at every position it gets the whole
    distribution that exact attention predicts.

    It calls `fit` on a `Distillation`, a model that holds the student and its teacher. Both run on
    the device in one step, and only the inputs are copied to it. Logits are computed for a few
    positions at a time.

    Args:
        model: a dark causal LM; `calibrate` it and `transfer_attention` first.
        teacher: the exact causal LM, such as the model before conversion (`convert_to_dark(model,
            copy=True)` keeps it); or an iterable of the `teacher_targets` for the same data.
        data: as for `calibrate`; repeated if it ends before `steps` do.
        steps: int. Training steps, of one batch each.
        train: what is trained besides the feature maps: `"qkv"`, the projections to queries, keys
            and values of the converted layers; `"lora"`, LoRA weights (call `enable_lora` first);
            `"all"`, every dense layer of the blocks; `"feature_maps"`, nothing else.
        learning_rate: float. Peak of a schedule that warms up over the first tenth of the steps and
            then decays by a cosine.
        feature_map_learning_rate: float. Peak rate of the feature maps, on the same schedule;
            `None` for three times `learning_rate`.
        optimizer: a `keras.optimizers.Optimizer`, used instead of AdamW with that schedule and
            gradients clipped to norm 1. Its rate is that of the dense layers; the rate of the
            feature maps is higher by the ratio of the two rates. It is not changed: a new optimizer
            gets its settings.
        top_k: int. How many of the teacher's likeliest tokens to distil from; `None` for the whole
            vocabulary.
        batch_size: int. Rows per batch of data that does not come in batches.
        validation_data: held-out data, as `data`; if `teacher` holds targets, a pair of data and
            its targets. The weights with the lowest loss on it are kept, and training stops after
            `patience` validations without a lower one.
        validate_every: int. Steps between validations.
        patience: int. Validations without a lower loss, after which training stops.
        backup: path of a file that keeps the trained weights and the optimizer, written every
            `validate_every` steps. If the fit is interrupted, the same call with the same file,
            data, settings and initial model continues it, to the same result.
        callbacks: Keras callbacks. Their `model` is the `Distillation`, whose `student` is the
            trained model. `RedrawProjections`, `ApproximationLogger` and `ModelCheckpoint` act on
            the student.
        verbose: 0 or `False` shows nothing, 2 Keras' line per epoch. Anything else shows progress:
            a line that is overwritten, or in a file a line now and then.

    Returns:
        The `History` of the fit, with epochs of `validate_every` steps. The model stays compiled,
        or not, as it was.

    Raises:
        ValueError: if an argument is out of range, nothing is trainable, the teacher's targets do
            not fit the data, or `backup` is damaged or from another fit.

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
    if teacher is model:
        raise ValueError(
            "`teacher` is the converted model itself. Convert a copy "
            "(`convert_to_dark(model, copy=True)`), or compute `teacher_targets` before it."
        )
    loss = DistillationLoss(top_k)
    noted = None if isinstance(teacher, keras.Model) else list(teacher)
    if noted is not None:
        loss = DistillationLoss(_noted_top_k(noted))
    layers = dark_layers(model)
    if optimizer is None:
        schedule = warm_cosine(learning_rate, steps)
        optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.0, clipnorm=1.0)
    if feature_map_learning_rate is None:
        feature_map_learning_rate = 3.0 * learning_rate
    feature_variables = [v for x in layers.values() for v in x.feature_map.variables]
    optimizer = two_rates(optimizer, feature_variables, feature_map_learning_rate / learning_rate)
    examples = _examples(model, noted, data, batch_size, repeat=True)
    held_out = None
    if validation_data is not None:
        of_held_out = None
        if noted is not None:
            validation_data, of_held_out = _data_and_targets(validation_data)
        held_out = list(_examples(model, of_held_out, validation_data, batch_size))
    with contextlib.ExitStack() as frozen:
        exact = None
        if noted is None:
            exact = teacher
            frozen.enter_context(_only_trainable(exact, ()))
        frozen.enter_context(_only_trainable(model, _chosen(model, layers, train)))
        frozen.enter_context(fitted(layers.values()))
        distillation = Distillation(model, exact, loss)
        distillation.compile(optimizer=optimizer)
        history = fit_steps(
            distillation,
            list(layers.values()),
            examples,
            held_out,
            steps=steps,
            validate_every=validate_every,
            patience=patience,
            backup=backup,
            callbacks=callbacks,
            verbose=verbose,
        )
    history.set_model(model)  # so that keeping it does not keep the teacher
    return history


def trained_variables(model: Model, train: str) -> list[Any]:
    """The variables that `distil(train=...)` trains."""
    return _chosen(model, dark_layers(model), one_of("train", train, TRAINABLE))


def _data_and_targets(pair: Any) -> tuple[Data, list[TeacherTargets]]:
    if not isinstance(pair, tuple) or len(pair) != 2 or isinstance(pair[1], np.ndarray):
        raise ValueError(
            "`validation_data` must be a pair of data and its `teacher_targets`, since `teacher` "
            f"holds targets. Received: {type(pair).__name__}"
        )
    targets = list(pair[1])
    _noted_top_k(targets)
    return pair[0], targets


def _noted_top_k(targets: list[TeacherTargets]) -> int | None:
    if not targets or not all(isinstance(x, TeacherTargets) for x in targets):
        raise ValueError("`teacher` must be a model or what `teacher_targets` gave for each batch.")
    ids = targets[0].token_ids
    return None if ids is None else ids.shape[-1]


def _examples(
    model: Model,
    noted: list[TeacherTargets] | None,
    data: Data,
    batch_size: int,
    repeat: bool = False,
) -> Iterator[Any]:
    """Batches as `Distillation` takes them, without end if `repeat`. Padding has weight 0."""
    if repeat and isinstance(data, Iterator):
        data = Kept(data)
    while True:
        left = iter(noted or ())
        for inputs in batches(model, data, batch_size):
            shape, mask = _predictions(inputs)
            weights = np.ones(shape) if mask is None else mask
            example = {"inputs": inputs, "weights": np.asarray(weights, "float32")}
            if noted is not None:
                targets = next(left, None)
                if targets is None or targets.log_probs.shape[:2] != shape:
                    raise ValueError(
                        "`teacher` must hold the targets of every batch of `data`, in its order: "
                        f"a batch of shape {shape} has none that fit."
                    )
                known = {k: v for k, v in targets._asdict().items() if v is not None}
                example["targets"] = known
            yield (example,)
        if not repeat:
            return


def _predictions(inputs: Any) -> tuple[tuple[int, ...], np.ndarray | None]:
    """The shape of the predictions, and a mask of those that count, or `None` for all."""
    if isinstance(inputs, dict) and "mask_positions" in inputs:  # of a masked LM
        return inputs["mask_positions"].shape[:2], None
    mask = inputs.get("padding_mask") if isinstance(inputs, dict) else None
    return keras.tree.flatten(inputs)[0].shape[:2], mask


def _chosen(model: Model, layers: dict[str, Layer], train: str) -> list[Any]:
    """The variables that are to be trained."""
    chosen = [v for layer in layers.values() for v in layer.feature_map.trainable_variables]
    every_layer = without_head(model)._flatten_layers()
    if train == "qkv":
        chosen += [
            v for x in layers.values() for dense in x.dense_layers() for v in dense.variables
        ]
    elif train == "all":
        dense_kinds = keras.layers.Dense | keras.layers.EinsumDense
        chosen += [v for x in every_layer if isinstance(x, dense_kinds) for v in x.variables]
    elif train == "lora":
        with_lora = [x for x in every_layer if getattr(x, "lora_enabled", False)]
        if not with_lora:
            raise ValueError('`train="lora"` needs LoRA weights: call `enable_lora` first.')
        chosen += [v for x in with_lora for v in x.trainable_variables]
    if not chosen:
        raise ValueError("Nothing is trainable: the feature maps are frozen, or there are none.")
    return [v for v in chosen if "seed" not in v.path]


@contextlib.contextmanager
def _only_trainable(model: Model, variables: Iterable[Any]) -> Iterator[None]:
    """Freezes all other variables of a model within the context."""
    chosen = {id(v) for v in variables}
    before = [(v, v.trainable) for v in model.variables]
    for v, _ in before:
        v.trainable = id(v) in chosen
    try:
        yield
    finally:
        for v, trainable in before:
            v.trainable = trainable
