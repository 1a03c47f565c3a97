"""`distil` trains what it says on the teacher's logits, and puts everything else back."""

import keras
import numpy as np
import pytest
from backends import (
    BACKEND,
    differentiated,
    largest_intermediate,
    on_one_backend,
    run,
    to_numpy,
    value_and_gradients,
)
from hub.models import LENGTH, VOCABULARY, attentions, gemma, gemma2, inputs, outputs, values

from keras_darkformer import DarkTransformerBlock, distil, teacher_targets
from keras_darkformer.training import (
    ApproximationLogger,
    DistillationLoss,
    LossSpikeCounter,
    RedrawProjections,
)
from keras_darkformer.training.distillation import Distillation
from keras_darkformer.training.positions import TOKENS, Parts, over_positions

from .models import dark_gemma, plain, tokens

pytestmark = pytest.mark.filterwarnings("ignore:Converting")

DATA = [inputs(14, 9, 5), inputs(7, 14, 12)]
# What is trained, and by a copy of which optimizer.
only_torch = pytest.mark.skipif(BACKEND != "torch", reason="settled before a backend computes")
only_torch_and_slow = (only_torch, pytest.mark.slow)


def log_softmax(x):
    x = x.astype("float64")
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergences(target, ours, top_k=None):
    """Per token, in float64, of log-probabilities; all tokens but the likeliest as one."""
    if top_k is not None:
        order = np.argsort(-target, axis=-1)[..., :top_k]
        target, ours = (np.take_along_axis(x, order, axis=-1) for x in (target, ours))
        if top_k < VOCABULARY:
            rest = [np.log1p(-np.exp(x).sum(-1, keepdims=True)) for x in (target, ours)]
            target, ours = (np.concatenate(x, -1) for x in zip((target, ours), rest, strict=True))
    return (np.exp(target) * (target - ours)).sum(-1)


def expected_loss(teacher, model, batch, top_k=None):
    """Over what is not padding."""
    target, ours = (log_softmax(outputs(x, batch)) for x in (teacher, model))
    return divergences(target, ours, top_k)[batch["padding_mask"].astype(bool)].mean()


def still():
    """An optimizer that goes nowhere."""
    return keras.optimizers.SGD(0.0)


@pytest.fixture(scope="module")
def pair():
    return dark_gemma(lambda: gemma(num_layers=1))


@pytest.mark.parametrize("top_k", [None, 1, 8, VOCABULARY])
def test_the_loss_is_what_float64_says(top_k, rng):
    logits = 3 * rng.standard_normal((2, 2, 5, VOCABULARY)).astype("float32")
    expected = divergences(*map(log_softmax, logits), top_k)
    loss = DistillationLoss(top_k)
    found = run(lambda x, y: loss.divergence(loss.targets(x), y), *logits)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert (expected > 0).all()
    mean = run(loss.compute_loss, *logits)
    np.testing.assert_allclose(mean, expected.mean(), rtol=1e-3)


def test_its_config_is_complete():
    config = keras.saving.serialize_keras_object(DistillationLoss(top_k=5))
    twin = keras.saving.deserialize_keras_object(config)
    assert type(twin) is DistillationLoss
    assert twin.top_k == 5


@pytest.mark.usefixtures("few_steps")
@pytest.mark.slow
def test_the_distiller_of_keras_takes_it():
    student, teacher = plain(geometry_scale=0.5), plain(attention_mode="exact")
    batch = tokens()
    expected = divergences(*(log_softmax(to_numpy(x(batch))) for x in (teacher, student)))
    loss = DistillationLoss()
    distiller = keras.distillation.Distiller(teacher, student, [loss], student_loss_weight=0.0)
    distiller.compile(optimizer=still(), loss=keras.losses.SparseCategoricalCrossentropy())
    history = distiller.fit(batch, batch, verbose=0).history
    np.testing.assert_allclose(history["distillation_loss"], [expected.mean()], rtol=1e-3)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("top_k", [None, 8, pytest.param(10 * VOCABULARY, marks=only_torch)])
def test_a_teacher_and_what_it_has_noted_down_give_the_same_loss(pair, top_k):
    stock, model = pair
    batch = DATA[0]
    expected = expected_loss(stock, model, batch, None if top_k is None else min(top_k, VOCABULARY))
    noted = list(teacher_targets(stock, [batch], top_k=top_k))
    for teacher in (stock, noted):
        history = distil(
            model, teacher, [batch], steps=1, top_k=top_k, optimizer=still(), verbose=0
        )
        np.testing.assert_allclose(history.history["loss"], [expected], rtol=1e-3)
    assert expected > 0.01


@pytest.mark.parametrize("at_a_time", [12, TOKENS])
def test_targets_are_the_likeliest_tokens_and_their_log_probabilities(pair, at_a_time, monkeypatch):
    monkeypatch.setattr("keras_darkformer.training.positions.TOKENS", at_a_time)
    (targets,) = teacher_targets(pair[0], [DATA[0]], top_k=5)
    expected = log_softmax(outputs(pair[0], DATA[0]))
    assert targets.token_ids.shape == targets.log_probs.shape == (3, LENGTH, 5)
    assert (targets.token_ids.dtype, targets.log_probs.dtype) == ("int32", "float32")
    likeliest = np.argsort(-expected, axis=-1)[..., :5]
    np.testing.assert_array_equal(np.sort(targets.token_ids), np.sort(likeliest))
    by_id = np.take_along_axis(expected, targets.token_ids, axis=-1)
    np.testing.assert_allclose(targets.log_probs, by_id, rtol=1e-3, atol=1e-3)
    best = -np.sort(-expected, axis=-1)[..., :5]
    np.testing.assert_allclose(-np.sort(-targets.log_probs, axis=-1), best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("top_k", [None, 8])
def test_no_tensor_of_the_whole_vocabulary_passes_the_host(pair, top_k, monkeypatch):
    stock, model = pair
    sizes = []
    to_numpy, fit = keras.src.backend.convert_to_numpy, Distillation.fit

    def watched(x):
        array = to_numpy(x)
        sizes.append(array.size)
        return array

    def watched_fit(self, examples, **options):
        def watched_examples():
            for example in examples:
                sizes.extend(leaf.size for leaf in keras.tree.flatten(example))
                yield example

        return fit(self, watched_examples(), **options)

    monkeypatch.setattr(keras.src.backend, "convert_to_numpy", watched)
    monkeypatch.setattr(Distillation, "fit", watched_fit)
    batch = inputs(14, 9, 5, 14, 3, 14)
    tokens_in_it = batch["token_ids"].size
    distil(model, stock, batch, steps=2, top_k=top_k, optimizer=still(), verbose=0)
    assert max(sizes) == tokens_in_it
    if top_k is not None:
        (noted,) = teacher_targets(stock, batch, top_k=top_k)
        assert max(sizes[-2:]) <= top_k * tokens_in_it
        distil(model, [noted], batch, steps=2, optimizer=still(), verbose=0)
        assert max(sizes) == top_k * tokens_in_it


@pytest.mark.parametrize("length", [5, 8, 11])
def test_slices_give_what_the_whole_gives(length, rng, monkeypatch):
    monkeypatch.setattr("keras_darkformer.training.positions.TOKENS", 12)
    hidden, known = rng.standard_normal((2, 3, length, 7)).astype("float32")
    kernel = rng.standard_normal((7, VOCABULARY)).astype("float32")
    loss = DistillationLoss()

    def divergence(hidden, known):
        targets = loss.targets(keras.ops.matmul(known, kernel))
        return loss.divergence(targets, keras.ops.matmul(hidden, kernel))

    def whole(hidden, known):
        return keras.ops.sum(divergence(hidden, known) ** 2)

    def sliced(hidden, known):
        return keras.ops.sum(over_positions(divergence, hidden, known, remat=True) ** 2)

    expected, found = (value_and_gradients(f, hidden, known) for f in (whole, sliced))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_slices_keep_logits_of_all_positions_out_of_memory(rng, monkeypatch):
    """Forward and backward."""
    monkeypatch.setattr("keras_darkformer.training.positions.TOKENS", 12)
    hidden, known = rng.standard_normal((2, 3, 24, 2)).astype("float32")
    kernel = rng.standard_normal((2, VOCABULARY)).astype("float32")
    loss = DistillationLoss()

    def divergence(hidden, known):
        targets = loss.targets(keras.ops.matmul(known, kernel))
        return loss.divergence(targets, keras.ops.matmul(hidden, kernel))

    def total(hidden, known):
        return keras.ops.sum(over_positions(divergence, hidden, known, remat=True))

    whole = 3 * 24 * VOCABULARY
    assert largest_intermediate(differentiated(divergence_sum(divergence)), hidden, known) >= whole
    assert largest_intermediate(differentiated(total), hidden, known) <= whole // 6


def divergence_sum(divergence):
    return lambda *arguments: keras.ops.sum(divergence(*arguments))


@pytest.mark.parametrize("build", [gemma, gemma2, plain])
def test_the_parts_of_a_model_are_the_model(build):
    model = build()
    batch = tokens() if build is plain else DATA[0]
    parts = Parts(model)
    hidden = parts.hidden(batch)
    assert tuple(hidden.shape) == (3, LENGTH, 16)
    np.testing.assert_allclose(
        to_numpy(parts.logits(hidden)), to_numpy(model(batch)), rtol=1e-5, atol=1e-5
    )


def test_a_model_that_can_not_be_taken_apart_is_its_own_first_part():
    class Halved(keras.Model):
        def call(self, inputs):
            return super().call(inputs) / 2

    model = plain()
    model = Halved(model.inputs, model.outputs)
    for whole in (model, keras.Sequential([model])):
        parts = Parts(whole)
        logits = parts.hidden(tokens())
        assert logits.shape[-1] == VOCABULARY
        assert parts.logits(logits) is logits


def settings(model):
    config = model._compile_config.config
    return {
        "optimizer": model.optimizer,
        "rate": float(model.optimizer.learning_rate),
        "loss": config["loss"],
        "weighted_metrics": config["weighted_metrics"],
        "sampler": model.sampler,
        "preprocessor": model.preprocessor,
    }


def flags(model):
    layers = {i: layer.trainable for i, layer in enumerate(model._flatten_layers())}
    return layers | {v.path: v.trainable for v in model.variables}


def compiled_and_partly_frozen(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(0.125), loss=loss, sampler="greedy")
    model.backbone.transformer_layers[0].gating_ffw.trainable = False
    model.backbone.token_embedding.trainable = False
    return model


QKV = {f"layer_1/attention/{name}/kernel" for name in ("query", "key", "value")}
MOVED = {
    "feature_maps": set(),
    "qkv": QKV,
    "lora": {
        f"{layer}/attention/{name}/{kernel}"
        for layer in ("layer_0", "layer_1")
        for name in ("query", "value")
        for kernel in ("lora_kernel_a", "lora_kernel_b")
    },
    "all": QKV
    | {f"layer_0/attention/{name}/kernel" for name in ("query", "key", "value")}
    | {
        f"{layer}/{name}/kernel"
        for layer in ("layer_0", "layer_1")
        for name in ("attention/attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear")
    },
}


@pytest.mark.parametrize(
    "train",
    [
        "qkv",
        pytest.param("lora", marks=pytest.mark.slow),
        *(pytest.param(x, marks=only_torch_and_slow) for x in MOVED if x not in ("qkv", "lora")),
    ],
)
def test_what_is_asked_for_moves_and_all_settings_come_back(train, request):
    """Gemma 2: its second layer is dark, its first is not."""
    if train != "qkv":
        request.getfixturevalue("few_steps")
    stock, model = dark_gemma(gemma2)
    if train == "lora":
        model.backbone.enable_lora(2)
    both = [compiled_and_partly_frozen(x) for x in (stock, model)]
    before, teacher_before = values(model), values(stock)
    before_flags, before_settings = list(map(flags, both)), list(map(settings, both))
    history = distil(
        model,
        stock,
        DATA,
        steps=12 if train == "qkv" else 2,
        learning_rate=5e-3,
        train=train,
        validation_data=DATA[:1] if train == "qkv" else None,
        verbose=0,
    ).history
    after = values(model)
    moved = {path for path, value in before.items() if (after[path] != value).any()}
    maps = {path for path in moved if path.endswith("/feature_map/geometry")}
    assert len(maps) == 1
    assert {_short(path) for path in moved - maps} == MOVED[train]
    assert {
        path for path, value in values(stock).items() if (teacher_before[path] != value).any()
    } == set()
    assert list(map(flags, both)) == before_flags
    assert list(map(settings, both)) == before_settings
    assert not model.optimizer.built
    if train == "qkv":
        np.testing.assert_allclose(
            history["val_loss"], [expected_loss(stock, model, DATA[0])], rtol=2e-3
        )


def _short(path):
    """From the decoder block on."""
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if part.startswith("decoder_block"))
    return "/".join([parts[first].replace("decoder_block", "layer"), *parts[first + 1 :]])


def test_the_model_comes_closer_to_its_teacher():
    stock, model = dark_gemma(lambda: gemma(num_layers=1))
    before = expected_loss(stock, model, DATA[0])
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs=None: seen.append(batch)
    )
    data = iter(DATA)  # two batches, gone through again
    distil(
        model, stock, data, steps=14, train="all", learning_rate=5e-3, callbacks=[watch], verbose=0
    )
    assert len(seen) == 14
    assert expected_loss(stock, model, DATA[0]) < 0.8 * before


@pytest.mark.usefixtures("few_steps")
def test_feature_maps_learn_faster_by_the_ratio_of_the_rates():
    stock, _ = dark_gemma(lambda: gemma(num_layers=1))

    def movement(ratio):
        _, model = dark_gemma(lambda: gemma(num_layers=1))
        before = values(model)
        distil(
            model,
            stock,
            DATA[:1],
            steps=1,
            learning_rate=1e-3,
            feature_map_learning_rate=ratio * 1e-3,
            optimizer=keras.optimizers.SGD(0.05),
            verbose=0,
        )
        return {path: value - before[path] for path, value in values(model).items()}

    one, five = movement(1), movement(5)
    for path, moved in one.items():
        expected = 5 * moved if "/feature_map/" in path else moved
        np.testing.assert_allclose(five[path], expected, rtol=2e-2, atol=2e-6, err_msg=path)
    assert max(np.abs(x).max() for path, x in one.items() if "/geometry" in path) > 1e-4


class Falling(keras.optimizers.schedules.LearningRateSchedule):
    """One that Keras can not write down."""

    def __call__(self, step):
        return 0.05 / (1.0 + keras.ops.cast(step, "float32"))


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.5, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01, beta_1=0.8, global_clipnorm=0.5),
    "schedule": lambda: keras.optimizers.RMSprop(Falling(), rho=0.7),
    "muon": lambda: keras.optimizers.Muon(0.01),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05), 4.0),
}


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(
    "name", ["adam", *(pytest.param(x, marks=only_torch) for x in OPTIMIZERS if x != "adam")]
)
def test_the_optimizer_stays_as_it_was_and_another_like_it_is_used(name, pair):
    stock, model = pair
    optimizer = OPTIMIZERS[name]()
    before = dict(vars(optimizer))
    variables = [(v, to_numpy(v.value)) for v in optimizer.variables]
    used = []
    watch = keras.callbacks.LambdaCallback(
        on_train_end=lambda logs: used.append(watch.model.optimizer)
    )
    distil(
        model,
        stock,
        DATA,
        steps=2,
        optimizer=optimizer,
        learning_rate=0.01,
        callbacks=[watch],
        verbose=0,
    )
    assert vars(optimizer) == before
    assert not optimizer.built
    assert [v for v, _ in variables] == optimizer.variables
    for variable, value in variables:
        np.testing.assert_array_equal(to_numpy(variable.value), value)
    (ours,) = used
    assert ours is not optimizer
    assert isinstance(ours, type(optimizer))
    assert int(ours.iterations) == 2
    if name == "schedule":
        assert ours._learning_rate is optimizer._learning_rate
    elif name != "scaled":
        assert ours.get_config() == optimizer.get_config()


def test_an_optimizer_of_several_is_refused(pair):
    several = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(default_optimizer=keras.optimizers.SGD())
    )
    with pytest.raises(ValueError, match="must have one learning rate"):
        distil(pair[1], pair[0], DATA, optimizer=several)


@on_one_backend
def test_callbacks_find_the_student(tmp_path):
    stock, model = dark_gemma(lambda: gemma(num_layers=1))
    feature_map = attentions(model)[0].feature_map
    learned = (feature_map.geometry, feature_map.projection)
    before = {w.path: to_numpy(w.value) for w in learned}
    spikes = LossSpikeCounter()
    path = str(tmp_path / "student.weights.h5")
    history = distil(
        model,
        stock,
        DATA,
        steps=2,
        callbacks=[
            spikes,
            RedrawProjections(every=1),
            ApproximationLogger(DATA[:1]),
            keras.callbacks.ModelCheckpoint(path, save_weights_only=True),
        ],
        verbose=0,
    )
    assert history.model is model
    assert set(history.history) == {
        "loss",
        "loss_spikes",
        "approximation_error",
        "approximation_kl",
    }
    after = {w.path: to_numpy(w.value) for w in learned}
    assert all((after[path] != value).any() for path, value in before.items())
    trained = outputs(model, DATA[0])
    for weight in model.weights:
        weight.assign(to_numpy(weight.value) + 1)
    model.load_weights(path)
    np.testing.assert_allclose(outputs(model, DATA[0]), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("few_steps")
def test_the_teacher_drops_nothing_out(pair):
    stock, model = pair
    teacher = gemma(num_layers=1, dropout=0.5)
    teacher.set_weights(stock.get_weights())
    history = distil(model, teacher, DATA[:1], steps=1, optimizer=still(), verbose=0)
    expected = expected_loss(stock, model, DATA[0])
    np.testing.assert_allclose(history.history["loss"], [expected], rtol=1e-3)


def test_what_keras_masks_weighs_nothing():
    def build(mode):
        token_ids = keras.Input((None,), dtype="int32")
        x = keras.layers.Embedding(VOCABULARY, 16, mask_zero=True)(token_ids)
        x = DarkTransformerBlock(16, 4, num_features=16, attention_mode=mode, seed=0)(x)
        return keras.Model(token_ids, keras.layers.Dense(VOCABULARY)(x))

    batch = DATA[0]["token_ids"]
    teacher, model = build("exact"), build("linear")
    history = distil(model, teacher, batch, steps=1, optimizer=still(), verbose=0)
    target, ours = (log_softmax(to_numpy(x(batch))) for x in (teacher, model))
    expected = divergences(target, ours)[batch > 0].mean()
    np.testing.assert_allclose(history.history["loss"], [expected], rtol=1e-3)


class Stumbling(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise RuntimeError("stumbled")


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"callbacks": [Stumbling()]}, RuntimeError),
        ({"validation_data": []}, ValueError),
        ({"train": "lora"}, ValueError),
    ],
    ids=["fit", "validation", "choice"],
)
def test_settings_come_back_after_an_error(options, error):
    both = [compiled_and_partly_frozen(x) for x in dark_gemma(lambda: gemma(num_layers=1))]
    stock, model = both
    before, before_settings = list(map(flags, both)), list(map(settings, both))
    teacher_before = values(stock)
    with pytest.raises(error):
        distil(model, stock, DATA, steps=2, verbose=0, **options)
    assert list(map(flags, both)) == before
    assert list(map(settings, both)) == before_settings
    for path, value in values(stock).items():
        np.testing.assert_array_equal(value, teacher_before[path], err_msg=path)
    assert all(np.isfinite(value).all() for value in values(model).values())


def test_targets_that_do_not_fit_are_refused(pair):
    stock, model = pair
    (noted,) = teacher_targets(stock, DATA[:1], top_k=4)
    cut = noted._replace(token_ids=noted.token_ids[:2], log_probs=noted.log_probs[:2])
    short = noted._replace(token_ids=noted.token_ids[:, :9], log_probs=noted.log_probs[:, :9])
    for targets, data in (([cut], DATA[:1]), ([short], DATA[:1]), ([noted], DATA)):
        with pytest.raises(ValueError, match="targets of every batch of `data`"):
            distil(model, targets, data, steps=2, verbose=0)
    for targets in ([], [np.ones(3)]):
        with pytest.raises(ValueError, match="what `teacher_targets` gave"):
            distil(model, targets, DATA, steps=1, verbose=0)
    with pytest.raises(ValueError, match="`validation_data` must be a pair"):
        distil(model, [noted], DATA[:1], steps=1, validation_data=DATA, verbose=0)


def test_noted_targets_validate_as_the_teacher_does(few_steps):
    losses = []
    for noted in (False, True):
        stock, model = dark_gemma(lambda: gemma(num_layers=1))
        targets = list(teacher_targets(stock, DATA, top_k=None))
        history = distil(
            model,
            targets[:1] if noted else stock,
            DATA[:1],
            steps=2,
            validation_data=(DATA[1:], targets[1:]) if noted else DATA[1:],
            verbose=0,
        ).history
        losses.append(history["val_loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"steps": 0}, "steps"), ({"train": "everything"}, "train"), ({"top_k": 0}, "top_k")],
)
def test_arguments_out_of_range_are_refused(pair, wrong, message):
    with pytest.raises(ValueError, match=message):
        distil(pair[1], pair[0], DATA, **wrong)


def test_a_model_can_not_teach_itself(pair):
    with pytest.raises(ValueError, match="the converted model itself"):
        distil(pair[1], pair[1], DATA)


def test_frozen_feature_maps_alone_are_nothing_to_train(pair):
    stock, model = dark_gemma(lambda: gemma(num_layers=1), train_geometry=False)
    with pytest.raises(ValueError, match="Nothing is trainable"):
        distil(model, stock, DATA, train="feature_maps", steps=1)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.slow
def test_a_plain_model_is_distilled_and_stays_as_uncompiled_as_it_was():
    model, teacher = plain(geometry_scale=0.5), plain(attention_mode="exact")
    batch = tokens()
    before = {w.path: to_numpy(w.value) for w in model.weights}
    history = distil(model, teacher, batch, steps=1, verbose=0).history
    target, ours = (log_softmax(to_numpy(x(batch))) for x in (teacher, plain(geometry_scale=0.5)))
    np.testing.assert_allclose(history["loss"], [divergences(target, ours).mean()], rtol=1e-3)
    moved = {w.path for w in model.weights if (to_numpy(w.value) != before[w.path]).any()}
    names = {path.split("/", 2)[-1] for path in moved}
    assert names == {
        "query/kernel",
        "query/bias",
        "key/kernel",
        "key/bias",
        "value/kernel",
        "value/bias",
        "feature_map/geometry",
    }
    assert not model.compiled
    assert all(not hasattr(x, "observer") or x.observer is None for x in model._flatten_layers())


def test_gradients_are_of_one_step_alone(few_steps):
    """The teacher's variables have the paths of the student's."""
    changes = []
    for steps in (1, 2):
        stock, model = dark_gemma(lambda: gemma(num_layers=1))
        before = values(model)
        # So little that the second gradient is the first.
        optimizer = keras.optimizers.SGD(1e-4)
        distil(model, stock, DATA[:1], steps=steps, optimizer=optimizer, verbose=0)
        after = values(model)
        changes.append({path: after[path] - value for path, value in before.items()})
    kernel = next(path for path in changes[0] if path.endswith("value/kernel"))
    once, twice = (change[kernel] for change in changes)
    assert np.abs(once).max() > 1e-6
    assert np.linalg.norm(twice) == pytest.approx(2 * np.linalg.norm(once), rel=0.02)


@pytest.mark.usefixtures("few_steps")
def test_a_step_in_slices_learns_what_a_whole_one_learns(monkeypatch):
    """Each slice reads the embeddings, a variable, to make its logits."""
    after = []
    for tokens_of_a_slice in (TOKENS, 12):
        monkeypatch.setattr("keras_darkformer.training.positions.TOKENS", tokens_of_a_slice)
        stock, model = dark_gemma(lambda: gemma(num_layers=1))
        distil(
            model,
            stock,
            DATA[:1],
            steps=1,
            train="all",
            optimizer=keras.optimizers.SGD(0.1),
            verbose=0,
        )
        after.append(values(model))
    for path, value in after[0].items():
        np.testing.assert_allclose(after[1][path], value, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_is_distilled_in_half_precision(dtype):
    stock, model = dark_gemma(lambda: gemma(num_layers=1, dtype=dtype))
    history = distil(model, stock, DATA, steps=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert {w.dtype for w in attentions(model)[0].feature_map.weights} == {"float32"}


@pytest.mark.usefixtures("few_steps")
def test_a_model_without_features_is_trained_around_them():
    teacher, model = dark_gemma(feature_map="none", sliding_window=4)
    before = values(model)
    distil(model, teacher, DATA, steps=1, verbose=0)
    moved = {path for path, value in values(model).items() if (value != before[path]).any()}
    assert moved
    assert all("/query/" in x or "/key/" in x or "/value/" in x for x in moved)
    with pytest.raises(ValueError, match="the feature maps are frozen, or there are none"):
        distil(model, teacher, DATA, steps=1, train="feature_maps", verbose=0)
