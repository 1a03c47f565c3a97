"""Small random checkpoints in the layout of Hugging Face, and what some of them compute.

A folder gets `config.json` and `model.safetensors`, with the names and shapes that `transformers`
gives them; tokenizers are written beside them where they are needed.
"""

import json

import numpy as np
from keras_hub.src.tokenizers.byte_pair_tokenizer import bytes_to_unicode
from safetensors.numpy import save_file

VOCABULARY, WIDTH, HEADS, KV_HEADS, INNER, LAYERS, LENGTH = 64, 32, 4, 2, 48, 2, 64
EPSILON = 1e-5

_ATTENTION = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": LENGTH,
    "vocab_size": VOCABULARY,
}
_DECODER = _ATTENTION | {
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": EPSILON,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_GEMMA = _DECODER | {"head_dim": 16, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
_QWEN = {"use_sliding_window": False, "sliding_window": None}
_EXPERTS = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
_BERT = _ATTENTION | {"layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.0, "type_vocab_size": 2}

# What is in `config.json`, by the `model_type`.
CONFIGS = {
    "gemma": _GEMMA,
    "gemma2": _GEMMA
    | {"query_pre_attn_scalar": 16, "sliding_window": 4}
    | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": _GEMMA
    | {"query_pre_attn_scalar": 16, "sliding_window": 4}
    | {"layer_types": ["sliding_attention"] * LAYERS},
    "llama": _DECODER,
    "mistral": _DECODER | {"sliding_window": None, "head_dim": WIDTH // HEADS},
    "mixtral": _DECODER
    | {"num_local_experts": 3, "num_experts_per_tok": 2}
    | {"sliding_window": None, "output_router_logits": False},
    "qwen2": _DECODER | _QWEN | {"tie_word_embeddings": True},
    "qwen2_moe": _DECODER | _QWEN | _EXPERTS | {"shared_expert_intermediate_size": 8},
    "qwen3": _DECODER | _QWEN | {"head_dim": 16},
    "qwen3_moe": _DECODER | _QWEN | _EXPERTS | {"head_dim": 16},
    "smollm3": _DECODER
    | {"no_rope_layers": [1, 0], "layer_types": ["full_attention"] * LAYERS}
    | {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False}
    | {"tie_word_embeddings": True},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS}
    | {"n_positions": LENGTH, "resid_pdrop": 0.0},
    "bert": _BERT,
    "roberta": _BERT | {"max_position_embeddings": LENGTH + 2, "type_vocab_size": 1},
    "distilbert": {"vocab_size": VOCABULARY, "dim": WIDTH, "n_heads": HEADS, "n_layers": LAYERS}
    | {"hidden_dim": INNER, "dropout": 0.0, "max_position_embeddings": LENGTH},
}
QWEN_BIASES = ("qwen2", "qwen2_moe")
HEAD_NORMS = ("gemma3_text", "qwen3", "qwen3_moe")


def _feedforward(config, kind):
    """Shapes of a decoder layer's weights behind the attention."""

    def gated(prefix, inner, names=("gate_proj", "up_proj", "down_proj")):
        shapes = ((inner, WIDTH), (inner, WIDTH), (WIDTH, inner))
        return {f"{prefix}.{name}.weight": of for name, of in zip(names, shapes, strict=True)}

    if kind == "mixtral":
        shapes = {"block_sparse_moe.gate.weight": (config["num_local_experts"], WIDTH)}
        for index in range(config["num_local_experts"]):
            prefix = f"block_sparse_moe.experts.{index}"
            shapes |= gated(prefix, INNER, names=("w1", "w3", "w2"))
        return shapes
    if "moe" not in kind:
        return gated("mlp", INNER)
    shapes = {"mlp.gate.weight": (config["num_experts"], WIDTH)}
    for index in range(config["num_experts"]):
        shapes |= gated(f"mlp.experts.{index}", config["moe_intermediate_size"])
    if kind == "qwen2_moe":
        shapes |= gated("mlp.shared_expert", config["shared_expert_intermediate_size"])
        shapes["mlp.shared_expert_gate.weight"] = (1, WIDTH)
    return shapes


def _decoder_shapes(config, kind):
    head_dim = config.get("head_dim", WIDTH // HEADS)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if kind in ("gemma2", "gemma3_text"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    layer = {f"{name}.weight": (WIDTH,) for name in norms}
    for name, heads in (("q", HEADS), ("k", config["num_key_value_heads"])):
        layer[f"self_attn.{name}_proj.weight"] = (heads * head_dim, WIDTH)
        if kind in QWEN_BIASES:
            layer[f"self_attn.{name}_proj.bias"] = (heads * head_dim,)
        if kind in HEAD_NORMS:
            layer[f"self_attn.{name}_norm.weight"] = (head_dim,)
    of_keys = "self_attn.k_proj."
    layer |= {
        name.replace("k_proj", "v_proj"): shape
        for name, shape in layer.items()
        if name.startswith(of_keys)
    }
    layer["self_attn.o_proj.weight"] = (WIDTH, HEADS * head_dim)
    layer |= _feedforward(config, kind)
    vocabulary = (config["vocab_size"], WIDTH)
    shapes = {"model.embed_tokens.weight": vocabulary, "model.norm.weight": (WIDTH,)}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = vocabulary
    return shapes


def _dense(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name):
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def _gpt2_shapes(config, kind):
    shapes = {
        "wte.weight": (config["vocab_size"], WIDTH),
        "wpe.weight": (LENGTH, WIDTH),
        **_norm("ln_f"),
    }
    layer = _norm("ln_1") | _norm("ln_2")
    for name, inputs, outputs in (
        ("attn.c_attn", WIDTH, 3 * WIDTH),
        ("attn.c_proj", WIDTH, WIDTH),
        ("mlp.c_fc", WIDTH, 4 * WIDTH),
        ("mlp.c_proj", 4 * WIDTH, WIDTH),
    ):
        layer |= {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}
    for index in range(config["n_layer"]):
        shapes |= {f"h.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def _encoder_shapes(config, kind):
    positions, width, layers = config["max_position_embeddings"], WIDTH, LAYERS
    embeddings = {"word": config["vocab_size"], "position": positions}
    if kind == "distilbert":
        attention = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin")
        norms = ("sa_layer_norm", "output_layer_norm")
        inner, outer, where = "ffn.lin1", "ffn.lin2", "transformer.layer"
    else:
        embeddings["token_type"] = config["type_vocab_size"]
        attention = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
        attention += ("attention.output.dense",)
        norms = ("attention.output.LayerNorm", "output.LayerNorm")
        inner, outer, where = "intermediate.dense", "output.dense", "encoder.layer"
    shapes = _norm("embeddings.LayerNorm")
    for name, size in embeddings.items():
        shapes[f"embeddings.{name}_embeddings.weight"] = (size, width)
    layer = _dense(inner, INNER, width) | _dense(outer, width, INNER)
    for name in attention:
        layer |= _dense(name, width, width)
    for name in norms:
        layer |= _norm(name)
    for index in range(layers):
        shapes |= {f"{where}.{index}.{name}": shape for name, shape in layer.items()}
    if kind == "bert":
        shapes |= _dense("pooler.dense", width, width)
    return {f"{kind}.{name}": shape for name, shape in shapes.items()}


def write(folder, kind, seed=0, **changes):
    """Writes a checkpoint of the `model_type` `kind`; returns its config and its tensors."""
    config = CONFIGS[kind] | changes
    encoders = ("bert", "roberta", "distilbert")
    shapes = {"gpt2": _gpt2_shapes} | dict.fromkeys(encoders, _encoder_shapes)
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.get(kind, _decoder_shapes)(config, kind).items():
        # Attention is to be sharp, and no norm or bias what it starts from.
        scale = 0.3 if len(shape) == 1 or "embed" in name else 2.0 / np.sqrt(shape[-1])
        around = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        tensors[name] = (around + scale * rng.standard_normal(shape)).astype("float32")
    folder.mkdir(parents=True, exist_ok=True)
    about = {"model_type": kind, "architectures": [f"{kind.title()}Model"]}
    (folder / "config.json").write_text(json.dumps(about | config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return config, tensors


# --- What a checkpoint computes, in float64 ---


def _softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def _rms_norm(x, scale, epsilon):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * scale


def _rotated(x, theta):
    """`(t, n, h)` rotated by positions, halves of a head against each other."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attended(query, key, value, causal):
    """Softmax attention of one text, `(t, n, h)`, with as many key/value heads or fewer."""
    groups = query.shape[1] // key.shape[1]
    key, value = (np.repeat(x, groups, axis=1) for x in (key, value))
    logits = np.einsum("tnh,snh->nts", query, key) / np.sqrt(query.shape[-1])
    if causal:
        logits = np.where(np.tri(len(query), dtype=bool), logits, -np.inf)
    mixed = np.einsum("nts,snh->tnh", _softmax(logits), value)
    return mixed.reshape(len(query), -1)


def decoder_logits(config, tensors, token_ids, epsilon=None):
    """Logits `(t, v)` of one text, by a checkpoint built like Llama."""
    tensors = {name: x.astype("float64") for name, x in tensors.items()}
    epsilon = config["rms_norm_eps"] if epsilon is None else epsilon
    x = tensors["model.embed_tokens.weight"][token_ids]
    for index in range(config["num_hidden_layers"]):
        of = {
            name.split(".", 3)[3]: tensor
            for name, tensor in tensors.items()
            if name.startswith(f"model.layers.{index}.")
        }
        normed = _rms_norm(x, of["input_layernorm.weight"], epsilon)
        heads = []
        for name, count in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            y = normed @ of[f"self_attn.{name}_proj.weight"].T
            y = (y + of.get(f"self_attn.{name}_proj.bias", 0)).reshape(len(x), count, -1)
            if f"self_attn.{name}_norm.weight" in of:
                y = _rms_norm(y, of[f"self_attn.{name}_norm.weight"], epsilon)
            if name != "v" and config.get("no_rope_layers", [1] * LAYERS)[index]:
                y = _rotated(y, config["rope_theta"])
            heads.append(y)
        x = x + _attended(*heads, causal=True) @ of["self_attn.o_proj.weight"].T
        normed = _rms_norm(x, of["post_attention_layernorm.weight"], epsilon)
        gate, up = (normed @ of[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ of["mlp.down_proj.weight"].T
    x = _rms_norm(x, tensors["model.norm.weight"], epsilon)
    return x @ tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).T


def bert_sequence(config, tensors, token_ids):
    """What Bert's encoder makes of one text of the first segment, `(t, d)`."""
    tensors = {name.split(".", 1)[1]: x.astype("float64") for name, x in tensors.items()}

    def norm(x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config["layer_norm_eps"])
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def dense(x, name):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    x = tensors["embeddings.word_embeddings.weight"][token_ids]
    x = x + tensors["embeddings.position_embeddings.weight"][: len(x)]
    x = norm(x + tensors["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for index in range(LAYERS):
        layer = f"encoder.layer.{index}"
        heads = (
            dense(x, f"{layer}.attention.self.{name}").reshape(len(x), HEADS, -1)
            for name in ("query", "key", "value")
        )
        y = dense(_attended(*heads, causal=False), f"{layer}.attention.output.dense")
        x = norm(x + y, f"{layer}.attention.output.LayerNorm")
        y = dense(x, f"{layer}.intermediate.dense")
        # KerasHub's Bert approximates what `transformers` computes by `erf`.
        y = y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))) / 2
        x = norm(x + dense(y, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x


# --- Tokenizers ---


def write_byte_pairs(folder, special, **tokenizer_config):
    """A byte-level tokenizer, as Llama 3, Qwen and GPT-2 have it; returns its vocabulary."""
    merges = ["t h", "th e"]
    tokens = [*bytes_to_unicode()[1], *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    of_special = {token: len(tokens) + index for index, token in enumerate(special)}
    added = [
        {"content": token, "id": index, "special": True} for token, index in of_special.items()
    ]
    model = {"type": "BPE", "vocab": vocabulary, "merges": [merge.split() for merge in merges]}
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "tokenizer.json": {"model": model, "added_tokens": added},
        "tokenizer_config.json": tokenizer_config,
        "vocab.json": vocabulary | of_special,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return vocabulary | of_special


def write_words(folder):
    """A tokenizer as Bert has it; returns its vocabulary."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "left", "right", "hand"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    return vocabulary
