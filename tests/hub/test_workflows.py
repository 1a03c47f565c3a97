"""What a user does with a stock KerasHub model, done with a dark one."""

import keras
import keras_hub
import numpy as np
import pytest
from backends import DEFAULT_JIT, MODES, further, on_one_backend, to_numpy
from keras import ops
from keras_hub.models import GPT2CausalLMPreprocessor, GPT2Tokenizer

from keras_darkformer import calibrate, convert_to_dark

from .models import DARK_WEIGHTS, dark, feature_maps, gemma, inputs, outputs, row, values

# Three ways to be put together: Gemma's blocks, Llama's, and Keras' own attention with biases.
BUILDERS = {
    "Gemma": lambda **options: gemma(num_layers=1, **options),
    "Llama": lambda **options: row("Llama", num_layers=1, **options),
    "GPT2": lambda **options: row("GPT2", num_layers=1, **options),
}
BATCH = inputs(9, 4, 6, total=9)
PROMPT = inputs(8, 2, 5)


@pytest.fixture(params=["Llama", *further("Gemma", "GPT2")])
def build(request):
    return BUILDERS[request.param]


# Where families do not differ; a new compilation each time is what takes long.
one_family = pytest.mark.parametrize("build", [BUILDERS["Llama"]], ids=["Llama"])


def generated(model, prompt=PROMPT):
    return model.generate(dict(prompt), stop_token_ids=None)["token_ids"]


# --- fit ---


def data(*lengths, total=9):
    """Inputs, labels and the weights that leave padding out."""
    x = inputs(*lengths, total=total)
    weights = x["padding_mask"].astype("float32")
    return x, np.roll(x["token_ids"], -1, axis=1), weights


def trained(model, batches, jit=DEFAULT_JIT, learning_rate=1e-3, **optimizer):
    """Weights after one step of `fit` for each of `batches`, which differ in length."""
    model.compile(
        optimizer=keras.optimizers.SGD(learning_rate, **optimizer),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"),
        weighted_metrics=None,
        jit_compile=jit,
    )
    keras.Model.fit(model, (x for x in batches), steps_per_epoch=len(batches), verbose=0)
    return values(model)


def gap(some, others):
    """The largest difference of weights."""
    assert some.keys() == others.keys()
    return max(np.abs(value - others[path]).max() for path, value in some.items())


@pytest.mark.usefixtures("few_steps")
@one_family
def test_labels_of_no_weight_do_not_count_and_weights_scale_the_loss(build):
    x, y, weights = data(9, 4, 6)
    nonsense = np.where(weights > 0, y, 1)
    before = values(dark(build()))
    plain = trained(dark(build()), [(x, y, weights)])
    assert gap(plain, before) > 1e-3
    assert gap(trained(dark(build()), [(x, nonsense, weights)]), plain) < 1e-6
    halved = trained(dark(build()), [(x, y, 0.5 * weights)], learning_rate=2e-3)
    assert gap(halved, plain) < 1e-5
    assert gap(trained(dark(build()), [(x, y)]), plain) > 1e-3


@pytest.mark.usefixtures("few_steps")
@one_family
def test_accumulated_gradients_of_two_batches_are_those_of_one(build):
    x, y, weights = data(9, 4, 6, 7)

    def rows(start, stop):
        part = {name: array[start:stop] for name, array in x.items()}
        return part, y[start:stop], weights[start:stop]

    halves = [rows(0, 2), rows(2, 4)]
    whole = trained(dark(build()), [rows(0, 4)])
    # Accumulated gradients are averaged, and this loss is a sum.
    options = {"learning_rate": 2e-3, "gradient_accumulation_steps": 2}
    assert gap(trained(dark(build()), halves, **options), whole) < 1e-5
    assert gap(trained(dark(build()), halves), whole) > 1e-4
    first = trained(dark(build()), halves[:1], **options)
    assert gap(first, values(dark(build()))) == 0


@one_family
@pytest.mark.parametrize("jit", MODES[-1:])
def test_batches_of_several_lengths_train_as_the_same_ones_padded(build, jit):
    lengths = [(6, 4, 3), (9, 5, 7)]
    batches = [data(*rows, total=max(rows)) for rows in lengths]
    padded = [
        (
            {name: np.pad(array, ((0, 0), (0, 9 - array.shape[1]))) for name, array in x.items()},
            *(np.pad(array, ((0, 0), (0, 9 - array.shape[1]))) for array in others),
        )
        for x, *others in batches
    ]
    model = dark(build())
    before, after = values(model), trained(model, batches, jit)
    assert gap(after, trained(dark(build()), padded)) < 1e-4
    geometry = next(path for path in after if path.endswith("geometry"))
    assert np.abs(after[geometry] - before[geometry]).max() > 1e-4


@one_family
@pytest.mark.parametrize("dtype", ["mixed_float16", "bfloat16"])
def test_fit_in_half_precision_keeps_feature_maps_in_float32(build, dtype):
    model = dark(build(dtype=dtype))
    before = values(model)
    x, y, weights = data(9, 4, 6)
    model.compile(optimizer=keras.optimizers.SGD(0.1), jit_compile=DEFAULT_JIT)
    history = model.fit(x, y, sample_weight=weights, batch_size=3, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    after = values(model)
    assert all(np.isfinite(value.astype("float32")).all() for value in after.values())
    for weight in model.weights:
        if "/feature_map/" in weight.path:
            assert weight.dtype == "float32"
            moved = (after[weight.path] != before[weight.path]).any()
            assert moved == weight.path.endswith("geometry")


@pytest.mark.usefixtures("few_steps")
def test_stock_adam_moves_nothing_in_pure_bfloat16():
    """Why the test above has another optimizer: 0.999 is 1 there."""
    model = BUILDERS["Llama"](dtype="bfloat16")
    before = values(model)
    x, y, weights = data(9, 4, 6)
    model.compile(optimizer=keras.optimizers.Adam(1e-2), jit_compile=DEFAULT_JIT)
    model.fit(x, y, sample_weight=weights, batch_size=3, verbose=0)
    assert gap(values(model), before) == 0


@pytest.fixture
def gpt2_preprocessor():
    """GPT-2's tokenizer with merges for two words."""
    merges = ["t h", "th e", "Ġ the", "c a", "ca t"]
    pieces = [
        "<|endoftext|>",
        "Ġ",
        *"abcdefghijklmnopqrstuvwxyz",
        *(x.replace(" ", "") for x in merges),
    ]
    tokenizer = GPT2Tokenizer(dict(zip(pieces, range(len(pieces)), strict=True)), merges)
    return GPT2CausalLMPreprocessor(tokenizer, sequence_length=16)


@on_one_backend
def test_fit_and_generate_on_strings_with_another_tokenizer(gpt2_preprocessor):
    model = convert_to_dark(row("GPT2", num_layers=1), num_features=16)
    model.preprocessor = gpt2_preprocessor
    texts = ["the cat saw the dog", "a dog", "the cat"]
    before = values(model)
    model.compile(optimizer=keras.optimizers.Adam(1e-2), sampler="greedy", jit_compile=DEFAULT_JIT)
    model.fit(texts, batch_size=3, epochs=2, verbose=0)
    still = {path for path, value in values(model).items() if (value == before[path]).all()}
    assert {path.rsplit("/", 1)[1] for path in still} == {*DARK_WEIGHTS} - {"geometry"}
    batch = gpt2_preprocessor.generate_preprocess(texts, sequence_length=16)
    assert to_numpy(batch["padding_mask"]).sum(1).tolist() == [13, 6, 4]
    for text, prompt in zip(model.generate(texts[1:], max_length=12), texts[1:], strict=True):
        assert text.startswith(prompt)


# --- LoRA ---


def with_lora(model, train_geometry=True, seed=0):
    """The model with LoRA and, if they are trainable, geometries that are as if trained."""
    rng = np.random.default_rng(seed)
    options = {} if train_geometry else {"train_geometry": False}
    model.backbone.enable_lora(2, **options)
    for weight in model.trainable_weights:
        if weight.name != "bias":
            value = to_numpy(weight.value)
            weight.assign(value + 0.1 * rng.standard_normal(value.shape))
    return model


@one_family
def test_fit_with_lora_moves_only_lora_and_geometries(build):
    model = dark(build())
    model.backbone.enable_lora(2)
    before, after = values(model), trained(model, [data(9, 4, 6)] * 2)
    moved = {path.rsplit("/", 1)[1] for path in after if (before[path] != after[path]).any()}
    assert moved - {"bias"} == {"lora_kernel_a", "lora_kernel_b", "geometry"}


@pytest.mark.parametrize("train_geometry", [True, *further(False)])
def test_a_lora_file_takes_a_freshly_converted_model_to_the_trained_one(
    build, train_geometry, tmp_path
):
    model = with_lora(dark(build()), train_geometry)
    model.backbone.save_lora_weights(tmp_path / "a.lora.h5")
    expected = outputs(model, BATCH)
    fresh = dark(build())
    assert np.abs(outputs(fresh, BATCH) - expected).max() > 0.01
    fresh.backbone.load_lora_weights(tmp_path / "a.lora.h5")
    np.testing.assert_array_equal(outputs(fresh, BATCH), expected)


@one_family
def test_a_lora_file_of_a_model_without_features_is_loaded(build, tmp_path):
    options = {"feature_map": "none", "sliding_window": 4}
    model = with_lora(convert_to_dark(build(), **options))
    model.backbone.save_lora_weights(tmp_path / "a.lora.h5")
    fresh = convert_to_dark(build(), **options)
    fresh.backbone.load_lora_weights(tmp_path / "a.lora.h5")
    np.testing.assert_array_equal(outputs(fresh, BATCH), outputs(model, BATCH))


def test_lora_enabled_before_the_conversion_is_kept_and_saved(build, tmp_path):
    stock = build()
    stock.backbone.enable_lora(2)
    rng = np.random.default_rng(0)
    for weight in stock.trainable_weights:
        if "lora" in weight.name:
            weight.assign(rng.standard_normal(weight.shape))
    lora = {path: value for path, value in values(stock).items() if "lora" in path}
    model = dark(stock)
    model.backbone.save_lora_weights(tmp_path / "a.lora.h5")
    fresh = dark(build())
    fresh.backbone.load_lora_weights(tmp_path / "a.lora.h5")
    loaded = values(fresh)
    assert lora
    for path, value in lora.items():
        np.testing.assert_array_equal(loaded[path], value)
    np.testing.assert_array_equal(outputs(fresh, BATCH), outputs(model, BATCH))


def test_lora_files_of_other_models_are_refused(tmp_path):
    build = BUILDERS["Llama"]
    with_lora_file = tmp_path / "a.lora.h5"
    stock = build()
    stock.backbone.enable_lora(2)
    stock.backbone.save_lora_weights(with_lora_file)
    model = dark(build())
    before = values(model)
    with pytest.raises(ValueError, match="saved from a stock model"):
        model.backbone.load_lora_weights(with_lora_file)
    other = dark(build())
    calibrate(other, BATCH, method="clusters", refine=False, verbose=False)
    with_lora(other).backbone.save_lora_weights(with_lora_file)
    with pytest.raises(ValueError, match="converted or calibrated differently"):
        model.backbone.load_lora_weights(with_lora_file)
    assert values(model).keys() == before.keys()


def test_a_lora_file_of_stock_gpt2_lacks_the_biases_that_are_trained_with_it(tmp_path):
    """And so does that of the dark one."""
    model = BUILDERS["GPT2"]()
    model.backbone.enable_lora(2)
    biases = [weight for weight in model.trainable_weights if weight.name == "bias"]
    for weight in biases:
        weight.assign(to_numpy(weight.value) + 1)
    model.backbone.save_lora_weights(tmp_path / "a.lora.h5")
    fresh = BUILDERS["GPT2"]()
    fresh.backbone.load_lora_weights(tmp_path / "a.lora.h5")
    assert biases
    for weight in biases:
        assert (values(fresh)[weight.path] != to_numpy(weight.value)).all()


# --- Numbers of few bits ---


def saved_and_loaded(model, folder):
    """The model by way of a preset, and by way of a file."""
    model.save_to_preset(folder / "preset")
    model.save(folder / "model.keras")
    return (
        keras_hub.models.CausalLM.from_preset(str(folder / "preset")),
        keras.saving.load_model(folder / "model.keras"),
    )


@pytest.mark.parametrize(
    ("build", "mode"),
    [
        pytest.param(BUILDERS["Gemma"], "int8", id="Gemma-int8"),
        *further(
            pytest.param(BUILDERS["Llama"], "int4", id="Llama-int4", marks=pytest.mark.slow),
            pytest.param(BUILDERS["GPT2"], "float8", id="GPT2-float8"),
            pytest.param(BUILDERS["GPT2"], "int8", id="GPT2-int8", marks=pytest.mark.slow),
        ),
    ],
)
def test_a_quantized_model_is_saved_and_loaded_and_generates(build, mode, tmp_path):
    model = dark(build())
    feature_map = values(feature_maps(model)[0])
    model.compile(sampler="greedy")
    generated(model)  # with a function that has to be dropped
    before = outputs(model, BATCH)
    model.quantize(mode)
    for path, value in feature_map.items():
        np.testing.assert_array_equal(values(feature_maps(model)[0])[path], value)
    expected, tokens = outputs(model, BATCH), generated(model)
    error = np.abs(expected - before).max() / np.abs(before).max()
    assert 0 < error < {"int8": 0.5, "int4": 1.5, "float8": 1.0}[mode]
    # Keras forgets how int4 was to treat activations: stock models lose as much.
    tolerance = 0.05 * np.abs(expected).max() if mode == "int4" else 1e-5
    for loaded in saved_and_loaded(model, tmp_path):
        assert type(loaded) is type(model)
        np.testing.assert_allclose(outputs(loaded, BATCH), expected, rtol=0, atol=tolerance)
    loaded.compile(sampler="greedy")
    found = generated(loaded)
    if mode != "int4":
        np.testing.assert_array_equal(found, tokens)


@on_one_backend
@pytest.mark.slow
def test_an_int4_model_of_stock_keras_is_not_quite_the_same_when_loaded(tmp_path):
    """Why `test_a_quantized_model_...` is lenient there."""
    model = BUILDERS["Llama"]()
    model.quantize("int4")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert np.abs(outputs(loaded, BATCH) - outputs(model, BATCH)).max() > 1e-3


TOLERANCES = {"mixed_bfloat16": 0.01, "bfloat16": 0.01, "mixed_float16": 0.002}


@pytest.mark.parametrize(
    ("build", "dtype"),
    [(BUILDERS[name], dtype) for name, dtype in zip(BUILDERS, TOLERANCES, strict=True)],
    ids=TOLERANCES,
)
def test_outputs_in_half_precision_are_near_those_in_float32(build, dtype):
    expected = outputs(dark(build()), PROMPT)
    model = dark(build(dtype=dtype))
    found = outputs(model, PROMPT)
    assert 0 < np.abs(found - expected).mean() < TOLERANCES[dtype] * np.abs(expected).max()
    for weight in model.weights:
        half = dtype == "bfloat16" and "/feature_map/" not in weight.path
        assert weight.dtype == ("bfloat16" if half else "float32")
    model.compile(sampler="greedy")
    tokens = generated(model)
    given = PROMPT["padding_mask"].astype(bool)
    np.testing.assert_array_equal(tokens[given], PROMPT["token_ids"][given])
    full = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    logits = outputs(model, full)
    # The state's rounding is another than the full forward's; near the top they may swap.
    chosen = np.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    behind = (logits[:, :-1].max(-1) - chosen)[~given[:, 1:]]
    assert behind.max() < 10 * TOLERANCES[dtype] * np.abs(logits).max()
    assert np.isfinite(to_numpy(ops.convert_to_tensor(logits))).all()
