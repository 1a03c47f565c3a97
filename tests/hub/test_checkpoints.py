"""Checkpoints in the layout of Hugging Face: loaded by KerasHub, converted, saved, exported."""

import json
import re
import warnings

import keras_hub
import numpy as np
import pytest

pytest.importorskip("safetensors")  # which KerasHub reads checkpoints with

from backends import BACKEND, on_one_backend, to_numpy

from keras_darkformer import hub

from . import checkpoints
from .checkpoints import CONFIGS, VOCABULARY, write
from .family_checks import BY_NAME, EXACT, close
from .models import dark, inputs, outputs, scramble_geometries

pytestmark = pytest.mark.filterwarnings("ignore:Converting", "ignore:KerasHub reads")

FAMILIES = {
    "gemma": "Gemma",
    "gemma2": "Gemma",
    "gemma3_text": "Gemma3",
    "llama": "Llama3",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen",
    "qwen2_moe": "QwenMoe",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "smollm3": "SmolLM3",
    "gpt2": "GPT2",
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
}
# Loaders only move arrays, on all backends the same ones.
KINDS = tuple(CONFIGS) if BACKEND == "torch" else ("llama",)
LIKE_LLAMA = [kind for kind in KINDS if kind in ("llama", "mistral", "qwen2", "qwen3", "smollm3")]
LLAMA_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
LLAMA_TOKENS += ("<|start_header_id|>", "<|end_header_id|>")


def stock_class(kind):
    """A causal LM, or an encoder's backbone."""
    family = BY_NAME[FAMILIES[kind]]
    return family.tasks["CausalLM"] if family.causal else family.backbone


def dark_class(kind):
    return getattr(hub, f"Dark{stock_class(kind).__name__}")


def without_tokenizer(kind):
    return {"preprocessor": None} if BY_NAME[FAMILIES[kind]].causal else {}


def load(cls, folder, kind, **options):
    return cls.from_preset(str(folder), **without_tokenizer(kind), **options)


def batch_for(model):
    return inputs(14, 5, 9, vocabulary=VOCABULARY, model=getattr(model, "backbone", model))


def one_text(model):
    return inputs(14, vocabulary=VOCABULARY, model=getattr(model, "backbone", model))


def numbers(arrays):
    """All of them in order, wherever they stand."""
    return np.sort(np.concatenate([np.ravel(x) for x in arrays]))


def stock_weights(model):
    """Those that are in a checkpoint."""
    return [
        to_numpy(x.value)
        for x in model.weights
        if "/feature_map/" not in x.path and not x.path.endswith("inv_freq")
    ]


def to_be_read(kind, tensors):
    """What KerasHub has a place for."""
    if kind == "mistral":  # whose loader goes through half precision
        return [x.astype("float16") for x in tensors.values()]
    if kind == "roberta":  # whose first two positions are of padding
        name = "roberta.embeddings.token_type_embeddings.weight"
        tensors = {path: x for path, x in tensors.items() if path != name}
        tensors["roberta.embeddings.position_embeddings.weight"] = tensors[
            "roberta.embeddings.position_embeddings.weight"
        ][2:]
    return list(tensors.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_loaded_whole_converted_saved_and_loaded(kind, tmp_path):
    _, tensors = write(tmp_path / "hf", kind)
    with warnings.catch_warnings():
        if kind != "llama":  # of which something is left out: see below
            warnings.filterwarnings("error", message="KerasHub reads")
        model = load(dark_class(kind), tmp_path / "hf", kind, num_features=16, layers=[0])
    assert type(model) is dark_class(kind)
    np.testing.assert_array_equal(numbers(stock_weights(model)), numbers(to_be_read(kind, tensors)))
    batch = batch_for(scramble_geometries(model))
    expected = outputs(model, batch)
    assert np.isfinite(expected).all()
    model.save_to_preset(tmp_path / "dark")
    for cls in (stock_class(kind), dark_class(kind)):
        loaded = load(cls, tmp_path / "dark", kind)
        assert type(loaded) is dark_class(kind)
        np.testing.assert_array_equal(outputs(loaded, batch), expected)


@pytest.mark.parametrize("kind", LIKE_LLAMA)
def test_logits_of_a_decoder_are_those_of_the_file(kind, tmp_path):
    config, tensors = write(tmp_path, kind)
    if kind == "mistral":
        tensors = {name: x.astype("float16") for name, x in tensors.items()}
    model = load(stock_class(kind), tmp_path, kind)
    batch = one_text(model)
    expected = checkpoints.decoder_logits(
        config, tensors, batch["token_ids"][0], epsilon=model.backbone.layer_norm_epsilon
    )
    close(outputs(model, batch)[0], expected)
    close(outputs(load(dark_class(kind), tmp_path, kind, **EXACT), batch)[0], expected)


@on_one_backend
def test_what_bert_makes_of_a_text_is_that_of_the_file(tmp_path):
    config, tensors = write(tmp_path, "bert")
    model = load(stock_class("bert"), tmp_path, "bert")
    batch = one_text(model)
    expected = checkpoints.bert_sequence(config, tensors, batch["token_ids"][0])
    close(outputs(model, batch)[0], expected)
    close(outputs(load(dark_class("bert"), tmp_path, "bert", **EXACT), batch)[0], expected)


@on_one_backend
@pytest.mark.parametrize("kind", ["phi3", "opt"])
def test_families_that_kerashub_does_not_read_say_so(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"no converter .* model type `'{kind}'`"):
        getattr(hub, {"phi3": "DarkPhi3Backbone", "opt": "DarkOPTBackbone"}[kind]).from_preset(
            str(tmp_path)
        )


# --- With tokenizers ---


def write_llama(folder, tokens=LLAMA_TOKENS, **changes):
    vocabulary = checkpoints.write_byte_pairs(
        folder, tokens, bos_token=tokens[0], eos_token=tokens[1]
    )
    return write(folder, "llama", vocab_size=len(vocabulary), **changes)


def written(model):
    model.compile(sampler="greedy")
    return model.generate(["the left", "a"], max_length=12)


@on_one_backend
def test_a_folder_with_a_tokenizer_becomes_a_dark_model_that_writes(tmp_path):
    write_llama(tmp_path / "hf")
    model = hub.DarkLlama3CausalLM.from_preset(str(tmp_path / "hf"), num_features=16)
    texts = written(model)
    assert texts[0].startswith("the left")
    model.save_to_preset(tmp_path / "dark")
    loaded = hub.DarkLlama3CausalLM.from_preset(str(tmp_path / "dark"))
    batch = loaded.preprocessor.generate_preprocess(texts, sequence_length=12)
    np.testing.assert_array_equal(outputs(loaded, batch), outputs(model, batch))
    tokenizers = (x.preprocessor.tokenizer for x in (model, loaded))
    assert len({tokenizer.detokenize(batch["token_ids"][0]) for tokenizer in tokenizers}) == 1


@on_one_backend
@pytest.mark.parametrize(
    "kind",
    ["gemma", *(pytest.param(x, marks=pytest.mark.slow) for x in ("qwen2", "smollm3", "gpt2"))],
)
def test_tokenizers_of_other_families_are_read(kind, tmp_path, sentencepiece_proto):
    folder, size = tmp_path / "hf", VOCABULARY
    if kind == "gemma":
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(sentencepiece_proto)
    else:
        special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|begin_of_text|>"]
        special += ["<|end_of_text|>", "<think>", "</think>"]
        size = len(checkpoints.write_byte_pairs(folder, special))
    write(folder, kind, vocab_size=size)
    model = dark_class(kind).from_preset(str(folder), num_features=16, layers="all")
    texts = written(model)
    assert texts[0].startswith("the left")
    model.save_to_preset(tmp_path / "dark")
    assert written(dark_class(kind).from_preset(str(tmp_path / "dark"))) == texts


@on_one_backend
def test_a_classifier_reads_its_words(tmp_path):
    size = len(checkpoints.write_words(tmp_path))
    write(tmp_path, "bert", vocab_size=size)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor.from_preset(
        str(tmp_path), sequence_length=8
    )
    model = hub.DarkBertTextClassifier.from_preset(
        str(tmp_path), preprocessor=preprocessor, num_classes=3, num_features=16
    )
    assert model.predict(["the left hand", "right"], verbose=0).shape == (2, 3)


# --- What KerasHub leaves out ---


@on_one_backend
def test_norms_that_are_read_with_another_epsilon_are_named_and_set_right(tmp_path):
    config, tensors = write(tmp_path, "llama")
    with pytest.warns(UserWarning, match=r"without its `rms_norm_eps=1e-05`.* use 1e-06"):
        load(hub.DarkLlama3CausalLM, tmp_path, "llama", num_features=16)
    # What the warning says.
    backbone = keras_hub.models.Llama3Backbone.from_preset(str(tmp_path), layer_norm_epsilon=1e-5)
    model = load(keras_hub.models.Llama3CausalLM, tmp_path, "llama", backbone=backbone)
    batch = one_text(model)
    expected = checkpoints.decoder_logits(config, tensors, batch["token_ids"][0])
    close(outputs(model, batch)[0], expected, tolerance=1e-5)


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 32}


@on_one_backend
@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "without its biases .attention_bias."),
        ("smollm3", {"attention_bias": True, "mlp_bias": True}, "attention_bias, mlp_bias"),
        ("llama", {"rope_parameters": SCALED | {"rope_theta": 1e4}}, "positions of type 'llama3'"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "positions of type 'yarn'"),
        ("llama", {"rope_scaling": SCALED}, None),
    ],
)
def test_what_else_is_left_out_is_named(kind, changes, message, tmp_path):
    write(tmp_path, kind, **changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(dark_class(kind), tmp_path, kind, num_features=16)
    said = [str(x.message) for x in caught if "KerasHub reads" in str(x.message)]
    said = [x for x in said if "rms_norm_eps" not in x]
    assert len(said) == (message is not None)
    assert all(re.search(message, text) for text in said)


@on_one_backend
def test_a_preset_of_another_class_is_refused(tmp_path):
    """KerasHub reads every checkpoint of Llama as Llama 3."""
    write(tmp_path, "llama")
    for name in ("CausalLM", "Backbone"):
        cls = getattr(hub, f"DarkLlama{name}")
        with pytest.raises(ValueError, match=rf"has a Llama3Backbone, but DarkLlama{name} needs"):
            cls.from_preset(str(tmp_path))


@on_one_backend
def test_tied_embeddings_of_llama_survive_in_a_dark_preset_and_fail_in_a_stock_one(tmp_path):
    """A stock config forgets them: KerasHub says so, in its way, and loads nothing."""
    config, tensors = write(tmp_path / "hf", "llama", tie_word_embeddings=True)
    model = load(keras_hub.models.Llama3CausalLM, tmp_path / "hf", "llama")
    batch = one_text(model)
    expected = checkpoints.decoder_logits(config, tensors, batch["token_ids"][0], epsilon=1e-6)
    close(outputs(model, batch)[0], expected)
    model.save_to_preset(tmp_path / "stock")
    for cls in (keras_hub.models.Llama3CausalLM, hub.DarkLlama3CausalLM):
        with pytest.raises(ValueError, match="'token_embedding' expected 2 variables"):
            load(cls, tmp_path / "stock", "llama")
    backbone = keras_hub.models.Llama3Backbone.from_preset(
        str(tmp_path / "stock"), tie_word_embeddings=True
    )
    np.testing.assert_array_equal(outputs(backbone, batch), outputs(model.backbone, batch))
    model = dark(model)
    model.save_to_preset(tmp_path / "dark")
    loaded = load(hub.DarkLlama3CausalLM, tmp_path / "dark", "llama")
    np.testing.assert_array_equal(outputs(loaded, batch), outputs(model, batch))


@on_one_backend
def test_a_preset_of_llama_forgets_the_tokens_of_its_tokenizer(tmp_path):
    """And takes another preprocessor: here SmolLM's tokens, which Llama 3 does not have."""
    folder = tmp_path / "hf"
    write_llama(folder, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
    model = hub.DarkLlama3CausalLM.from_preset(str(folder), num_features=16)
    texts = written(model)
    model.save_to_preset(tmp_path / "dark")
    with pytest.raises(ValueError, match="Cannot find special token"):
        hub.DarkLlama3CausalLM.from_preset(str(tmp_path / "dark"))
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor.from_preset(str(folder))
    loaded = hub.DarkLlama3CausalLM.from_preset(str(tmp_path / "dark"), preprocessor=preprocessor)
    assert written(loaded) == texts


# --- Export ---


EXPORTED = [
    ("gemma", {"num_key_value_heads": 1, "head_dim": 8}),
    ("gemma3_text", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {}),
    ("qwen2", {}),
    ("gpt2", {}),
]


@pytest.mark.parametrize(("kind", "changes"), EXPORTED if BACKEND == "torch" else EXPORTED[2:3])
def test_stock_weights_are_exported_when_that_is_meant(kind, changes, tmp_path):
    write(tmp_path / "hf", kind, **changes)
    stock = load(stock_class(kind), tmp_path / "hf", kind)
    batch = batch_for(stock)
    expected = outputs(stock, batch)
    model = dark(stock)
    darkened = outputs(model, batch)
    assert np.abs(darkened - expected).max() > 1e-2 * np.abs(expected).max()
    for part in (model, model.backbone):
        with pytest.raises(ValueError, match=r"no place for feature maps.*`as_softmax=True`"):
            part.export_to_transformers(str(tmp_path / "export"))
    assert not (tmp_path / "export").exists()

    model.export_to_transformers(str(tmp_path / "export"), as_softmax=True)
    np.testing.assert_array_equal(outputs(model, batch), darkened)
    assert isinstance(model.backbone, hub.conversion.DarkBackbone)
    config = tmp_path / "export" / "config.json"
    # What KerasHub's exporter does not write and its loader asks for.
    missing = {"architectures": [kind], "use_sliding_window": False, "sliding_window": None}
    config.write_text(json.dumps(missing | json.loads(config.read_text())))
    loaded = load(stock_class(kind), tmp_path / "export", kind)
    assert type(loaded) is stock_class(kind)
    np.testing.assert_array_equal(outputs(loaded, batch), expected)


@on_one_backend
def test_a_backbone_is_exported_alone(tmp_path):
    write(tmp_path / "hf", "gpt2")
    model = load(keras_hub.models.GPT2Backbone, tmp_path / "hf", "bert")
    batch = batch_for(model)
    expected = outputs(model, batch)
    model = dark(model)
    model.export_to_transformers(str(tmp_path / "export"), as_softmax=True)
    loaded = keras_hub.models.GPT2Backbone.from_preset(str(tmp_path / "export"))
    np.testing.assert_array_equal(outputs(loaded, batch), expected)


@on_one_backend
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma2", {"num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8}),
        ("gemma", {"num_key_value_heads": 1, "head_dim": 16}),
        ("gemma", {"num_key_value_heads": 2, "head_dim": 8}),
    ],
)
def test_what_kerashub_exports_wrongly_is_refused(kind, changes, tmp_path):
    write(tmp_path / "hf", kind, **changes)
    model = load(dark_class(kind), tmp_path / "hf", kind, num_features=16, layers="all")
    for part in (model, model.backbone):
        with pytest.raises(ValueError, match="right only for models built like Gemma 1 2B"):
            part.export_to_transformers(str(tmp_path / "export"), as_softmax=True)
    assert not (tmp_path / "export").exists()


@on_one_backend
@pytest.mark.parametrize(
    ("kind", "changes"), [("gemma", {"num_key_value_heads": 1, "head_dim": 8}), ("gemma3_text", {})]
)
def test_an_export_that_would_lose_lora_is_refused(kind, changes, tmp_path):
    write(tmp_path / "hf", kind, **changes)
    model = load(dark_class(kind), tmp_path / "hf", kind, num_features=16, layers="all")
    model.backbone.enable_lora(2)
    with pytest.raises(ValueError, match="leaves LoRA out"):
        model.export_to_transformers(str(tmp_path / "export"), as_softmax=True)


@on_one_backend
@pytest.mark.parametrize("kind", ["qwen3", "smollm3", "bert"])
def test_families_that_kerashub_does_not_export_say_so_and_stay_dark(kind, tmp_path):
    write(tmp_path / "hf", kind)
    model = load(dark_class(kind), tmp_path / "hf", kind, num_features=16)
    name = BY_NAME[FAMILIES[kind]].backbone.__name__
    with pytest.raises(ValueError, match=f"not implemented for {name}"):
        model.export_to_transformers(str(tmp_path / "export"), as_softmax=True)
    assert type(getattr(model, "backbone", model)).__name__ == f"Dark{name}"
