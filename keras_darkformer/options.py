"""The options of feature maps, attention layers and conversions, each defined once.

A layer takes them as keyword arguments, keeps them as one object, and writes them flat into its
config.
"""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

import numpy as np

from keras_darkformer.checks import is_integer, one_of, optional_integer, positive_integer
from keras_darkformer.memory import Memory
from keras_darkformer.types import Config

ATTENTION_MODES = ("linear", "exact", "auto")
FEATURE_MAPS = ("dark", "exponential", "none")
PROJECTIONS = ("orthogonal", "gaussian", "antithetic")
ROPE_GEOMETRIES = ("after", "before")
# The default options of `linearize` for a causal LM. On a real decoder they do better, on text and
# on lookups, than features with fewer kept keys in the same bytes.
LINEARIZED = {"feature_map": "none", "sliding_window": 64, "num_sinks": 4, "cache_size": 188}
# Arguments that every Keras layer takes besides its own.
KERAS_ARGUMENTS = ("name", "dtype", "trainable", "activity_regularizer")

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Options of a feature map.

    Args:
        num_features: int. Features m per key/value head. More features estimate the kernel better
            and cost more.
        feature_map: `"dark"` for `DarkFeatureMap`, the paper's; `"exponential"` for
            `ExponentialFeatureMap`, which has no geometry and is fitted by calibration with
            `method="clusters"`; or `"none"` for the window, sinks and kept keys alone.
        rank: int. Rows r of the geometry; `None` for `head_dim`.
        projection: `"orthogonal"`, `"gaussian"` or `"antithetic"`; see `ops.draw_projection`.
        train_geometry: bool. Whether the geometry is trainable. False, with `geometry_scale=1.0`,
            is Performer.
        train_projection: bool. Whether the projection is trainable: the features are then learned,
            no longer random.
        geometry_scale: float. The geometry starts at this multiple of the identity. Values below 1
            make the kernel flatter and its estimate less noisy.
        tie_geometry: bool. Whether queries and keys share one geometry, as in the paper. If they do
            not, the kernel is `exp(q^' M_q' M_k k^)`.
        rope_geometry: whether the geometry is applied `"after"` or `"before"` queries and keys are
            rotated by their positions. After the rotation, the kernel can have any shape at the
            positions seen in calibration. Before it, relative positions keep their meaning.
        sliding_window: int. Each query of a causal call attends to its last `sliding_window` keys
            with softmax's own kernel, and features stand only for keys further back. `None` for no
            window.
        num_sinks: int. Queries of a causal call also attend to the first `num_sinks` tokens of
            their row with softmax's own kernel. Trained models put much of their attention there,
            and 4 are enough.
        cache_size: int. Queries also attend with softmax's own kernel to `cache_size` of the tokens
            in between: for each key/value head, those that received most attention while they were
            in the window. Needs a `sliding_window`.
        seed: int. Seed of the projection; `None` for a random one, which
            `keras.utils.set_random_seed` makes repeatable.

    Raises:
        ValueError: if a value is out of range; the message names the option.
    """

    num_features: int = 256
    feature_map: str = "dark"
    rank: int | None = None
    projection: str = "orthogonal"
    train_geometry: bool = True
    train_projection: bool = False
    geometry_scale: float = 1.0
    tie_geometry: bool = True
    rope_geometry: str = "after"
    sliding_window: int | None = None
    num_sinks: int = 0
    cache_size: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        self._settle("num_features", _each(self.num_features, positive_integer, "num_features"))
        self._settle("feature_map", _each(self.feature_map, _known_map, "feature_map"))
        for name in ("rank", "sliding_window"):
            self._settle(name, optional_integer(name, getattr(self, name)))
        self.memory.check()
        one_of("projection", self.projection, PROJECTIONS)
        one_of("rope_geometry", self.rope_geometry, ROPE_GEOMETRIES)
        scale = self.geometry_scale
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"`geometry_scale` must be positive and finite. Received: {scale!r}")
        if self.seed is not None:
            if not is_integer(self.seed) or self.seed < 0:
                raise ValueError(
                    f"`seed` must be an integer, 0 or more. Received: seed={self.seed!r}"
                )
            self._settle("seed", int(self.seed))

    @property
    def memory(self) -> Memory:
        """The sizes of the exact memory."""
        return Memory(self.sliding_window, self.num_sinks, self.cache_size)

    def _settle(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def names(cls) -> list[str]:
        """The options' names, in order."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def split(cls, arguments: Mapping[str, Any]) -> tuple[Config, Config]:
        """Splits keyword arguments into these options and the others."""
        names = set(cls.names())
        dark = {name: value for name, value in arguments.items() if name in names}
        return dark, {name: value for name, value in arguments.items() if name not in names}

    @classmethod
    def take(
        cls,
        owner: Callable[..., Any],
        arguments: Mapping[str, Any],
        besides: Sequence[str] = KERAS_ARGUMENTS,
    ) -> tuple[Self, Config]:
        """These options from the keyword arguments of `owner`, and the other arguments.

        Args:
            owner: class or function whose signature shows the options.
            arguments: its keyword arguments.
            besides: names of other arguments that it takes.

        Raises:
            TypeError: if an argument is unknown; the message names the nearest known one.
        """
        dark, others = cls.split(arguments)
        cls.check_names(owner, others, besides)
        return cls(**dark), others

    @classmethod
    def check_names(
        cls,
        owner: Callable[..., Any],
        arguments: Mapping[str, Any],
        besides: Sequence[str] = KERAS_ARGUMENTS,
    ) -> None:
        """Raises a TypeError if an argument is unknown; see `take`."""
        known = [*inspect.signature(owner).parameters, *besides]
        for name in arguments:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean `{near[0]}`?" if near else ""
                raise TypeError(f"`{owner.__name__}` has no argument `{name}`.{hint}")

    def of(self, kind: type["FeatureOptions"], **changes: Any) -> Any:
        """The options of these that class `kind` has, with changes."""
        own = {name: getattr(self, name) for name in kind.names()}
        return kind(**own | changes)

    def get_config(self) -> Config:
        """A flat dict that JSON can hold and the constructor takes."""
        config = {name: getattr(self, name) for name in self.names()}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in config.items()
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions(FeatureOptions):
    """Options of an attention layer: those of `FeatureOptions`, and how attention is computed.

    Args:
        attention_mode: `"linear"`; `"exact"` for the learned kernel itself, quadratic in the
            length, for comparison; or `"auto"`, which computes short sequences exactly, where that
            is faster, and others in linear time. A layer's `computes_exactly` says which applies.
        exact_below: int. With `attention_mode="auto"`, sequences of fewer tokens are computed
            exactly. `None` picks the length by backend and shape from measurements, and always uses
            the features in training.
        chunk_size: int. Tokens handled at once in causal linear attention; `None` picks by shape.
            It does not change the result.
        remat: bool. Whether the backward pass recomputes the features of each block of the sequence
            instead of keeping them; `None` does so where it is faster. See `ops.dark_attention`.
    """

    attention_mode: str = "linear"
    exact_below: int | None = None
    chunk_size: int | None = None
    remat: bool | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        super().__post_init__()
        one_of("attention_mode", self.attention_mode, ATTENTION_MODES)
        for name in ("exact_below", "chunk_size"):
            self._settle(name, optional_integer(name, getattr(self, name)))
        if self.exact_below is not None and self.attention_mode != "auto":
            raise ValueError(
                '`exact_below` needs `attention_mode="auto"`. '
                f"Received: exact_below={self.exact_below}, attention_mode={self.attention_mode!r}"
            )

    @property
    def is_linear(self) -> bool:
        """Whether layers have features and a state, as in every mode except `"exact"`."""
        return self.attention_mode != "exact"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionOptions(AttentionOptions):
    """Options of a conversion: those of `AttentionOptions`, and which layers are converted.

    `num_features` and `feature_map` may be sequences with one entry for each converted layer.

    Args:
        layers: `"global"` converts the layers without a sliding window, or all layers if each has
            one (Mistral's older models); `"auto"` converts those of them that can be converted and
            warns about the others; `"all"` converts every layer, and a sequence of indices just
            those layers. The other layers keep softmax and their key/value cache. For models that
            are not from KerasHub, `convert_to_dark` accepts more.
        geometry_scale: float. Each geometry starts at this multiple of the identity. `None` for
            `min(1, sqrt(log(m) / (2 sqrt(h))))`, at which m features can just estimate the kernel
            for queries and keys of unit variance. 1.0 starts at softmax's own kernel, whose
            estimate is noise for large heads.
        seed: int. Seed of the projections; every layer has one of its own.
    """

    layers: str | Sequence[int] = "global"
    num_features: int | Sequence[int] = 256  # type: ignore[assignment]
    feature_map: str | Sequence[str] = "dark"  # type: ignore[assignment]
    geometry_scale: float | None = None  # type: ignore[assignment]
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks what can be checked before a model is touched."""
        super().__post_init__()
        if isinstance(self.layers, str):
            if self.layers in ("global", "auto", "all"):
                return
        elif isinstance(self.layers, Iterable) and all(map(is_integer, self.layers)):
            self._settle("layers", tuple(int(index) for index in self.layers))
            return
        raise ValueError(
            '`layers` must be "global", "auto", "all" or a sequence of layer indices. '
            f"Received: layers={self.layers!r}"
        )

    def resolve(self, is_local: Sequence[bool], head_dim: int) -> "ConversionOptions":
        """These options with one entry per converted layer and all defaults filled in.

        Args:
            is_local: for each layer of a model, whether it has a sliding window.
            head_dim: int.
        """
        layers = _resolve_layers(self.layers, is_local)
        counts = _one_a_layer("num_features", self.num_features, len(layers))
        maps = _one_a_layer("feature_map", self.feature_map, len(layers))
        scale = self.geometry_scale
        if scale is None:
            with_features = [m for m, kind in zip(counts, maps, strict=True) if kind != "none"]
            scale = default_geometry_scale(head_dim, min(with_features or counts))
        return dataclasses.replace(
            self,
            layers=layers,
            geometry_scale=float(scale),
            num_features=counts,
            feature_map=maps,
        )

    def get_config(self) -> Config:
        """As for other options; a value shared by all layers is written once."""
        config = super().get_config()
        for name in ("num_features", "feature_map"):
            if isinstance(config[name], list) and len(set(config[name])) == 1:
                config[name] = config[name][0]
        return config

    def by_layer(self) -> dict[int, AttentionOptions]:
        """The options of each converted layer by its index; `resolve` must come first."""
        layers, counts, maps = map(_as_tuple, (self.layers, self.num_features, self.feature_map))
        return {
            index: self.of(
                AttentionOptions,
                num_features=m,
                feature_map=kind,
                seed=layer_seed(self.seed, index),
            )
            for index, m, kind in zip(layers, counts, maps, strict=True)
        }


def shows_options(options: type, but: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Makes a function's signature show the options that its last parameter, `**kwargs`, takes.

    `but` names options that are not shown: `DarkFeatureMap`, for one, fixes `feature_map`.
    """

    def show(function: Function) -> Function:
        signature = inspect.signature(function)
        *own, rest = signature.parameters.values()
        taken = {*but, *(parameter.name for parameter in own)}
        shown = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=field.type,
            )
            for field in dataclasses.fields(options)
            if field.name not in taken
        ]
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*own, *shown, rest]
        )
        return function

    return show


def default_geometry_scale(head_dim: int, num_features: int) -> float:
    """The scale at which m features can still tell queries and keys of unit variance apart.

    One feature's relative variance is `exp(|M(q^ + k^)|^2) - 1`. For entries of unit variance and
    `M = alpha I`, `|M(q^ + k^)|^2` is about `2 alpha^2 sqrt(h)`; the result is the alpha at which
    that is `log m`, or 1 if it is larger. The kernel is flatter than softmax's, but the features
    can estimate it: at alpha = 1 and h = 256 the estimate is noise.
    """
    return min(1.0, math.sqrt(math.log(max(num_features, 2)) / (2.0 * math.sqrt(head_dim))))


def layer_seed(seed: int, index: int) -> int:
    """A separate seed for every layer."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def _known_map(name: str, value: Any) -> str:
    return one_of(name, value, FEATURE_MAPS)


def _each(value: Any, check: Callable[[str, Any], Any], name: str) -> Any:
    """A checked value, or a tuple of them."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(check(name, one) for one in value)
    return check(name, value)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _one_a_layer(name: str, value: Any, count: int) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        return (value,) * count
    if len(value) != count:
        raise ValueError(
            f"`{name}` must be one value or one for each of the {count} converted layers. "
            f"Received: {value!r}"
        )
    return value


def _resolve_layers(layers: str | Sequence[int], is_local: Sequence[bool]) -> tuple[int, ...]:
    count = len(is_local)
    if isinstance(layers, str):
        every = layers == "all" or all(is_local)
        chosen = tuple(i for i in range(count) if every or not is_local[i])
    else:
        if wrong := [i for i in layers if not -count <= i < count]:
            raise ValueError(
                f"`layers` must hold indices of the model's {count} layers. Received: {wrong}"
            )
        chosen = tuple(sorted({i % count for i in layers}))
    if not chosen:
        raise ValueError(f"`layers` is empty: nothing would be converted. Received: {layers!r}")
    return chosen
