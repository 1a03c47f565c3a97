"""What a conversion was asked to do; kept in the converted model's config."""

import dataclasses
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_darkformer.checks import one_of, positive_integer
from keras_darkformer.layers.dark_attention import ATTENTION_MODES
from keras_darkformer.layers.dark_feature_map import ROPE_GEOMETRIES
from keras_darkformer.ops.projections import PROJECTIONS

# Base of the classes that turn a stock class dark: type checkers can't know
# which stock class stands behind them.
Mixin: Any = object


@dataclasses.dataclass(frozen=True)
class DarkOptions:
    """The dark arguments of `convert_to_dark` and of the dark backbones.

    Attributes:
        num_features: Random features per key/value head; one number, or one
            for each converted layer.
        layers: `"global"` for the layers without a sliding window, or all
            where each has one; `"all"`, or a sequence of indices.
        attention_mode: `"linear"` or `"exact"`.
        geometry_scale: The geometry starts at this times the identity; `None`
            for `default_geometry_scale`.
        train_geometry: Whether geometries are trainable.
        train_projection: Whether projections are trainable.
        projection: `"orthogonal"`, `"gaussian"` or `"antithetic"`.
        tie_geometry: Whether queries and keys share a geometry.
        rope_geometry: `"after"`, `"before"` or `"planes"`.
        sliding_window: Tokens met with the exact kernel, or `None`.
        window_only: Whether the features are left out.
        feature_forms: Forms of the converted layers' feature maps, what
            calibration made of them; `None` for all `"random"`.
        chunk_size: Tokens handled at once, or `None`.
        remat: Whether the backward pass recomputes features, or `None`.
        seed: Seed of the projections.
    """

    num_features: int | Sequence[int] = 256
    layers: str | Sequence[int] = "global"
    attention_mode: str = "linear"
    geometry_scale: float | None = None
    train_geometry: bool = True
    train_projection: bool = False
    projection: str = "orthogonal"
    tie_geometry: bool = True
    rope_geometry: str = "after"
    sliding_window: int | None = None
    window_only: bool = False
    feature_forms: Sequence[str] | None = None
    chunk_size: int | None = None
    remat: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks what can be checked before a model is touched."""

        def settle(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if isinstance(self.num_features, Sequence) and not isinstance(self.num_features, str):
            counts = tuple(positive_integer("num_features", count) for count in self.num_features)
            settle("num_features", counts)
        else:
            settle("num_features", positive_integer("num_features", self.num_features))
        if self.chunk_size is not None:
            settle("chunk_size", positive_integer("chunk_size", self.chunk_size))
        if self.sliding_window is not None:
            settle("sliding_window", positive_integer("sliding_window", self.sliding_window))
        elif self.window_only:
            raise ValueError("`window_only=True` needs a `sliding_window`.")
        if not _is_integer(self.seed) or self.seed < 0:
            raise ValueError(f"`seed` must be an integer, 0 or more. Received: seed={self.seed!r}")
        settle("seed", int(self.seed))
        if not isinstance(self.layers, str):
            if not isinstance(self.layers, Iterable) or not all(map(_is_integer, self.layers)):
                raise ValueError(
                    '`layers` must be "global", "all" or a sequence of layer indices. '
                    f"Received: layers={self.layers!r}"
                )
            settle("layers", tuple(int(index) for index in self.layers))
        one_of("attention_mode", self.attention_mode, ATTENTION_MODES)
        one_of("projection", self.projection, PROJECTIONS)
        one_of("rope_geometry", self.rope_geometry, ROPE_GEOMETRIES)
        if self.rope_geometry != "after" and not self.tie_geometry:
            raise ValueError(f'`rope_geometry="{self.rope_geometry}"` needs `tie_geometry=True`.')
        if self.geometry_scale is not None and not 0 < self.geometry_scale < math.inf:
            raise ValueError(
                f"`geometry_scale` must be positive and finite. Received: {self.geometry_scale!r}"
            )

    @classmethod
    def split(
        cls, arguments: Mapping[str, Any], stock_cls: type | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parts keyword arguments into dark ones and the others.

        Args:
            arguments: keyword arguments.
            stock_cls: the class they are for besides, see `dark_name`.
        """
        names = {dark_name(field.name, stock_cls): field.name for field in dataclasses.fields(cls)}
        dark = {names[name]: value for name, value in arguments.items() if name in names}
        return dark, {name: value for name, value in arguments.items() if name not in names}

    def resolve(self, is_local: Sequence[bool], head_dim: int) -> "DarkOptions":
        """These options with `layers` as indices and `geometry_scale` as a number."""
        scale = self.geometry_scale
        if scale is None:
            counts = self.num_features
            fewest = min(counts) if isinstance(counts, Sequence) else counts
            scale = default_geometry_scale(head_dim, fewest)
        layers = _resolve_layers(self.layers, is_local)
        if isinstance(self.num_features, Sequence) and len(self.num_features) != len(layers):
            raise ValueError(
                "`num_features` must be one integer or one for each of the "
                f"{len(layers)} converted layers. Received: {self.num_features!r}"
            )
        forms = ("random",) * len(layers) if self.feature_forms is None else self.feature_forms
        if len(forms) != len(layers):
            raise ValueError(
                f"`feature_forms` must have one entry for each of the {len(layers)} converted "
                f"layers. Received: {self.feature_forms!r}"
            )
        return dataclasses.replace(
            self, layers=layers, geometry_scale=float(scale), feature_forms=tuple(forms)
        )

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """`layers` once resolved."""
        return tuple(index for index in self.layers if isinstance(index, int))

    def get_config(self) -> dict[str, Any]:
        """A dict that JSON can hold and the constructor takes."""
        config = dataclasses.asdict(self)
        if not isinstance(self.layers, str):
            config["layers"] = list(self.layers)
        if isinstance(self.num_features, Sequence):
            config["num_features"] = list(self.num_features)
        if self.feature_forms is not None:
            config["feature_forms"] = list(self.feature_forms)
        return config


def argument_names(stock_cls: type) -> set[str]:
    """Names of a class's constructor arguments."""
    return set(inspect.signature(stock_cls).parameters)


def dark_name(option: str, stock_cls: type | None) -> str:
    """What an option is called beside the arguments of a stock class.

    Mistral, for one, has a `sliding_window` of its own.
    """
    taken = stock_cls is not None and option in argument_names(stock_cls)
    return f"dark_{option}" if taken else option


def default_geometry_scale(head_dim: int, num_features: int) -> float:
    """The scale at which m features can still tell queries and keys of unit variance apart.

    One feature's relative variance is `exp(|M(q^ + k^)|^2) - 1`. For entries
    of unit variance and `M = alpha I`, `|M(q^ + k^)|^2` is about
    `2 alpha^2 sqrt(h)`; this is the alpha at which that is `log m`, at most 1.
    A flatter kernel than softmax's, but one the features can estimate: at
    alpha = 1 and h = 256 the estimate is noise.
    """
    return min(1.0, math.sqrt(math.log(max(num_features, 2)) / (2.0 * math.sqrt(head_dim))))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _resolve_layers(layers: str | Sequence[int], is_local: Sequence[bool]) -> tuple[int, ...]:
    count = len(is_local)
    if isinstance(layers, str):
        if layers not in ("global", "all"):
            raise ValueError(
                '`layers` must be "global", "all" or a sequence of layer indices. '
                f"Received: layers={layers!r}"
            )
        every = layers == "all" or all(is_local)
        chosen = tuple(i for i in range(count) if every or not is_local[i])
    else:
        wrong = [i for i in layers if not -count <= i < count]
        if wrong:
            raise ValueError(
                f"`layers` must hold indices of the model's {count} layers. Received: {wrong}"
            )
        chosen = tuple(sorted({i % count for i in layers}))
    if not chosen:
        raise ValueError("`layers` is empty: nothing would be converted.")
    return chosen
