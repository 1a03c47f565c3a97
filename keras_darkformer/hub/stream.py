"""Texts that continue across calls and sessions."""

import pathlib
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from keras import ops, tree

from keras_darkformer.checks import positive_integer
from keras_darkformer.hub.causal_lm import DarkCausalLM, is_linear
from keras_darkformer.ops.backend import compiled, compiles


class Stream:
    """Reads and writes a text piece by piece, in memory that does not grow with its length.

    The model's state stands for all tokens read so far: a few tensors of constant size per layer.
    It is kept between calls, and `save` writes it to disk. Exact layers keep a key/value cache
    instead, for at most `max_length` tokens. All streams of a model share their compiled functions.

    Args:
        model: a dark causal LM.
        batch_size: int. Number of texts read in parallel.
        max_length: int. Longest text, in tokens. Required if any layer is exact. `None` sets no
            limit but that of a table of learned positions.

    Attributes:
        position: int. Tokens read so far.

    Raises:
        ValueError: if `model` is not a dark causal LM or needs `max_length`, or `batch_size` is not
            a positive integer.

    Example:

        stream = keras_darkformer.hub.Stream(model)
        stream.read(model.preprocessor.tokenizer(["A long text"]))
        stream.save("text.npz")
        # in another session
        stream = keras_darkformer.hub.Stream.load("text.npz", model)
        tokens = stream.write(100)
        text = model.preprocessor.tokenizer.detokenize(tokens)
    """

    def __init__(self, model: Any, batch_size: int = 1, max_length: int | None = None) -> None:
        if not isinstance(model, DarkCausalLM):
            raise ValueError(
                "`model` must be a causal LM made by `convert_to_dark`. "
                f"Received: {type(model).__name__}"
            )
        backbone = model.backbone
        if max_length is None and not all(map(is_linear, backbone.attention_layers)):
            raise ValueError(
                "`max_length` is needed: layers left exact keep a key/value cache, which must "
                "have a size. Convert all layers to read texts without a limit."
            )
        if backbone.family.rotary is None:  # learned positions come from a table
            table = backbone.max_sequence_length
            max_length = table if max_length is None else min(max_length, table)
        self.model = model
        self.max_length = max_length
        self.position = 0
        # The last token is not in the state yet: sampling starts with it.
        self._last = np.zeros((positive_integer("batch_size", batch_size), 0), "int32")
        self._state = model.get_initial_cache(batch_size, max_length or 0)
        self._functions = _Functions.of(model)

    def read(self, token_ids: Any) -> Any:
        """Reads tokens.

        Args:
            token_ids: int array or tensor of shape `(batch_size, t)`, or `(t,)` for a batch of one.
                Padding is not allowed: all rows have t tokens.

        Returns:
            Logits of the next token, a tensor of shape `(batch_size, vocabulary)`.

        Raises:
            ValueError: if the shape is wrong, or the text would get longer than `max_length`. The
                stream is then as it was.
        """
        token_ids = np.asarray(ops.convert_to_numpy(token_ids))
        batch_size = len(self._last)
        if token_ids.ndim == 1 and batch_size == 1:
            token_ids = token_ids[None]
        if token_ids.ndim != 2 or len(token_ids) != batch_size or not token_ids.size:
            raise ValueError(
                f"`token_ids` must have shape ({batch_size}, t), t at least 1. "
                f"Received: shape {token_ids.shape}"
            )
        self._check_room(token_ids.shape[1])
        tokens = np.concatenate([self._last, token_ids.astype("int32")], axis=1)
        state, start = self._state, self.position - self._last.shape[1]
        for size in _pieces(tokens.shape[1] - 1, self.model.prefill_size):
            state = self._run(self._functions.enter, tokens[:, :size], state, start)
            tokens, start = tokens[:, size:], start + size
        logits, _, _ = self._run(self._functions.step, tokens, state, start)
        self._state, self._last, self.position = state, tokens, start + 1
        return logits[:, -1]

    def write(self, num_tokens: int, stop_token_ids: Any = None) -> np.ndarray:
        """Continues the text with the model's sampler, set by `compile`, and reads the new tokens.

        A sampler that is modified after its first use may keep its old settings: `compile` with a
        new one.

        Args:
            num_tokens: int. Tokens to write.
            stop_token_ids: iterable of int. Writing ends once every row has one of them; `None`
                never stops.

        Returns:
            Token ids, an int32 array of shape `(batch_size, num_tokens)`, or shorter if all rows
            stopped. In a row that stopped before the others, ignore what follows its stop token;
            the stream has read it, too.

        Raises:
            ValueError: if nothing was read yet, or the text would get longer than `max_length`.
        """
        positive_integer("num_tokens", num_tokens)
        if not self.position:
            raise ValueError("`read` at least one token first: there is nothing to continue.")
        self._check_room(num_tokens)
        stops = None if stop_token_ids is None else tuple(int(x) for x in stop_token_ids)
        sample = self._functions.sample(self.model.sampler, stops)
        prompt = np.pad(self._last, [(0, 0), (0, num_tokens)])
        start = ops.convert_to_tensor(self.position - 1, "int32")
        found = sample(ops.convert_to_tensor(prompt), self._state, start)
        written = np.asarray(ops.convert_to_numpy(found))[:, 1:].astype("int32")
        if stops is not None:
            ends = [np.flatnonzero(np.isin(row, stops)) for row in written]
            if all(end.size for end in ends):
                written = written[:, : 1 + max(end[0] for end in ends)]
        self.read(written)
        return written

    def _run(self, function: Any, token_ids: np.ndarray, state: Any, start: int) -> Any:
        # As tensors, or TensorFlow would retrace for every position.
        return function(
            ops.convert_to_tensor(token_ids), state, ops.convert_to_tensor(start, "int32")
        )

    def _check_room(self, count: int) -> None:
        if self.max_length is not None and self.position + count > self.max_length:
            raise ValueError(
                f"The text would get longer than `max_length={self.max_length}`: "
                f"{self.position} tokens were read, {count} more are asked for."
            )

    def save(self, path: Any) -> None:
        """Writes the stream, but not the model, to a file.

        Args:
            path: path of the `.npz` file.
        """
        leaves = [_stored(leaf) for leaf in tree.flatten(self._state)]
        arrays: dict[str, Any] = {f"state_{index}": leaf for index, leaf in enumerate(leaves)}
        longest = -1 if self.max_length is None else self.max_length
        np.savez(path, last=self._last, position=self.position, max_length=longest, **arrays)

    @classmethod
    def load(cls, path: Any, model: Any) -> "Stream":
        """Loads a stream that `save` wrote.

        Args:
            path: the file.
            model: the model that read the text, with the same weights.

        Raises:
            ValueError: if the shapes of the state do not fit the model.
        """
        with np.load(path) as arrays:
            longest = int(arrays["max_length"])
            last = arrays["last"]
            stream = cls(model, len(last), None if longest < 0 else longest)
            expected = tree.flatten(stream._state)
            stored = [arrays[f"state_{i}"] for i in range(len(arrays.files) - 3)]
            position = int(arrays["position"])
        if [x.shape for x in stored] != [tuple(x.shape) for x in expected]:
            maps = [layer.feature_map for layer in model.backbone.dark_layers.values()]
            counts = sorted({feature_map.num_features for feature_map in maps})
            raise ValueError(
                f"{pathlib.Path(path).name!r} holds the state of another model: its tensors have "
                f"other shapes than those of {type(model).__name__} with "
                f"{' and '.join(map(str, counts))} features."
            )
        leaves = [
            ops.convert_to_tensor(x, dtype=like.dtype)
            for x, like in zip(stored, expected, strict=True)
        ]
        stream._state = tree.pack_sequence_as(stream._state, leaves)
        stream._last, stream.position = last, position
        return stream


class _Functions:
    """The compiled functions that all streams of a model share."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.variables = model.variables
        self.step = compiled(model.call_with_cache, self.variables)
        # For tokens whose logits nobody asks for: with a large vocabulary, those of a piece would
        # take more memory than all else.
        self.enter = compiled(model.enter_cache, self.variables)
        self.sampler: Any = None
        self.samples: dict[Any, Any] = {}

    @classmethod
    def of(cls, model: Any) -> "_Functions":
        """The functions of another stream, or new ones if the model's variables have changed since.

        New feature maps, LoRA and quantization change the variables.
        """
        found = _functions[model]() if model in _functions else None
        if found is None or [*map(id, found.variables)] != [*map(id, model.variables)]:
            found = cls(model)
            _functions[model] = weakref.ref(found)
        return found

    def sample(self, sampler: Any, stops: Any) -> Any:
        """The function that continues a text with the model's sampler."""
        if self.sampler is not sampler:
            self.sampler, self.samples = sampler, {}
        if stops not in self.samples:
            self.samples[stops] = compiled(
                lambda prompt, state, start: _sample(self.model, prompt, state, start, stops),
                self.variables,
                sampler.variables,
            )
        return self.samples[stops]


# By model, for as long as a stream holds them: they hold the model and its variables.
_functions: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _sample(model: Any, prompt: Any, state: Any, start: Any, stops: Any) -> Any:
    def next_token(prompt: Any, cache: Any, index: Any) -> Any:
        last = ops.slice(prompt, [0, index - 1], [prompt.shape[0], 1])
        logits, hidden, cache = model.call_with_cache(last, cache, start + index - 1)
        return ops.squeeze(logits, axis=1), ops.squeeze(hidden, axis=1), cache

    return model.sampler(
        next=next_token,
        prompt=prompt,
        cache=state,
        index=1,
        mask=ops.broadcast_to(ops.arange(prompt.shape[1]) < 1, prompt.shape),
        stop_token_ids=stops,
        hidden_states=ops.zeros((*prompt.shape, model.backbone.hidden_dim)),
        model=model,
    )


def _stored(leaf: Any) -> np.ndarray:
    # NumPy has no bfloat16 of its own, and its files can't hold one.
    if ops.is_tensor(leaf) and "float" in ops.dtype(leaf):
        leaf = ops.cast(leaf, "float32")
    return np.asarray(ops.convert_to_numpy(leaf))


def _pieces(length: int, largest: int | None) -> Iterator[int]:
    """Sizes that add up to a length, with few different ones where each is compiled."""
    size = length if largest is None else largest
    while length:
        while size > length:
            size = max(size // 2, 1) if compiles() else length
        yield size
        length -= size
