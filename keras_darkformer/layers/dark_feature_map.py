"""The learned part of DARKFormer: a geometry and the projection drawn for it."""

import math
import random
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_darkformer.calibration.far_mass import FarMass
from keras_darkformer.calibration.feature_maps import (
    UNUSED,
    CalibrationOptions,
    fit_feature_map,
)
from keras_darkformer.calibration.sample import LayerStatistics
from keras_darkformer.checks import one_of, positive_integer
from keras_darkformer.ops import (
    apply_geometry,
    dark_attention,
    dark_attention_state,
    dark_features,
    draw_projection,
    feature_attention,
    feature_attention_state,
    initial_state,
    proposal_log_weight,
)
from keras_darkformer.ops.features import (
    FeatureMap,
    direct_projections,
    fold_projections,
    fold_window,
)
from keras_darkformer.ops.projections import PROJECTIONS
from keras_darkformer.ops.scores import log_scores

FORMS = ("random", "centered", "free")
ROPE_GEOMETRIES = ("after", "before", "planes")
# Weights that depend on the form.
WEIGHTS = (
    "geometry",
    "query_geometry",
    "projection",
    "proposal",
    "log_weight",
    "query_shift",
    "key_shift",
    "query_kernel",
    "key_kernel",
    "key_bias",
    "far_offset",
)


@keras.saving.register_keras_serializable(package="keras_darkformer")
class DarkFeatureMap(keras.layers.Layer):
    """Positive random features whose covariance is learned.

    Owns, per head, a geometry M and a projection W, and with them the feature
    map of the dark kernel `exp(q^' Sigma k^)`, `Sigma = M'M`:

        phi_j(x) = m^(-1/2) exp(w_j . M x^ - |M x^|^2 / 2),    x^ = h^(-1/4) x

    Rows of W are drawn from `N(0, I)`; seen from x, the directions `M'w` are
    drawn from `N(0, Sigma)`, where the data has its weight once M is trained.

    | `train_geometry` | `train_projection` | this is |
    | --- | --- | --- |
    | true | false | DARKFormer |
    | false | false | Performer (with `geometry_scale=1.0`) |
    | false | true | the learned-feature kernel |

    `calibrate` fits a map to queries and keys. All weights are float32 under
    every dtype policy.

    Args:
        num_heads: int. Heads k of keys and values, each with its own map.
        head_dim: int. Size h of a head.
        num_features: int. Features m per head.
        rank: int. Rows r of the geometry; `None` for `head_dim`.
        projection: `"orthogonal"`, `"gaussian"` or `"antithetic"`; see
            `ops.draw_projection`.
        train_geometry: bool. Whether the geometry is trainable.
        train_projection: bool. Whether the projection is trainable.
        geometry_scale: float. The geometry starts at this times the identity.
            Below 1 it trades a flatter kernel for less noise.
        tie_geometry: bool. One geometry for queries and keys, as in the paper,
            or one each: then the kernel is `exp(q^' M_q' M_k k^)`.
        rope_geometry: where the geometry of rotated queries and keys sits:
            `"after"` the rotation, `"before"` it, or `"planes"`, one scalar
            per rotary plane, which commutes with it. Only `"after"` is a
            kernel of any shape at every pair of positions; the other two see
            relative positions only.
        form: what `calibrate` made of the map, to build it again: `"random"`
            as above; `"centered"` with shifts of queries and keys and a
            proposal for W; `"free"`, exponential features without geometry
            (`ops.feature_attention`).
        sliding_window: int or `None`. The last tokens, met with the exact
            kernel; see `ops.dark_attention`. Adds a weight, `far_offset`.
        window_only: bool. Leaves out all but the window. An attribute, too,
            that can be set at any time.
        num_query_heads: int, a multiple of `num_heads`; `None` for as many.
            Only a sliding window asks for it.
        seed: int. Seed of the projection; `None` for a random one, which
            `keras.utils.set_random_seed` makes repeatable.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        inputs: queries or keys of shape `(b, s, num_heads, head_dim)`.
        keys: bool. Whether they are keys: of an uncalibrated map with tied
            geometry the features are the same.

    Returns:
        Their features, float32, of shape `(b, s, num_heads, num_features)`.

    Raises:
        ValueError: if a size is not a positive integer, an option unknown or
            `geometry_scale` not positive, and for options that exclude each
            other.

    Example:

    >>> feature_map = keras_darkformer.DarkFeatureMap(2, 8, 64, seed=0)
    >>> q, k, v = (np.random.normal(size=(1, 100, 2, 8)) for _ in range(3))
    >>> feature_map.calibrate(q, k, method="spectral")
    >>> feature_map.attend(q, k, v, causal=True).shape
    (1, 100, 2, 8)

    References:
        - [Data-Aware Random Feature Kernel for Transformers](https://arxiv.org/abs/2603.04127)
        - [Rethinking Attention with Performers](https://arxiv.org/abs/2009.14794)
    """

    trainable: Any  # a property of the base class

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_features: int,
        *,
        rank: int | None = None,
        projection: str = "orthogonal",
        train_geometry: bool = True,
        train_projection: bool = False,
        geometry_scale: float = 1.0,
        tie_geometry: bool = True,
        rope_geometry: str = "after",
        form: str = "random",
        sliding_window: int | None = None,
        window_only: bool = False,
        num_query_heads: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < geometry_scale < math.inf:
            raise ValueError(
                f"`geometry_scale` must be positive and finite. Received: {geometry_scale!r}"
            )
        self.num_heads = positive_integer("num_heads", num_heads)
        self.head_dim = positive_integer("head_dim", head_dim)
        self.num_features = positive_integer("num_features", num_features)
        self.rank = self.head_dim if rank is None else positive_integer("rank", rank)
        self.projection_kind = one_of("projection", projection, PROJECTIONS)
        self.train_geometry = train_geometry
        self.train_projection = train_projection
        self.geometry_scale = geometry_scale
        self.tie_geometry = tie_geometry
        self.rope_geometry = one_of("rope_geometry", rope_geometry, ROPE_GEOMETRIES)
        self.form = one_of("form", form, FORMS)
        if sliding_window is not None:
            sliding_window = positive_integer("sliding_window", sliding_window)
        self.sliding_window = sliding_window
        self.window_only = window_only
        self.num_query_heads = (
            self.num_heads
            if num_query_heads is None
            else positive_integer("num_query_heads", num_query_heads)
        )
        self.seed = random.randrange(2**31) if seed is None else seed
        self._check_options()

    def _check_options(self) -> None:
        if self.num_query_heads % self.num_heads:
            raise ValueError(
                f"`num_query_heads` must be a multiple of `num_heads`, {self.num_heads}. "
                f"Received: num_query_heads={self.num_query_heads}"
            )
        if self.rope_geometry != "after":
            if not self.tie_geometry or self.rank != self.head_dim:
                raise ValueError(
                    f'`rope_geometry="{self.rope_geometry}"` needs `tie_geometry=True` and a full '
                    f"`rank`. Received: tie_geometry={self.tie_geometry}, rank={self.rank}"
                )
            if self.head_dim % 2:
                raise ValueError(
                    f'`rope_geometry="{self.rope_geometry}"` needs an even `head_dim`. '
                    f"Received: head_dim={self.head_dim}"
                )
        if self.window_only and self.sliding_window is None:
            raise ValueError("`window_only=True` needs a `sliding_window`.")
        if self.form == "free" and self.sliding_window is not None:
            raise ValueError(
                'Features of `form="free"` know the kernel up to a factor of the query only, '
                "so they can't share a normaliser with the exact kernel of a `sliding_window`."
            )

    def build(self, input_shape: Any = None) -> None:
        """Creates the weights; their shapes do not depend on the input's."""
        self._create_weights(np.zeros(self.num_query_heads))
        self.built = True

    def _create_weights(self, far_offset: np.ndarray) -> None:
        self._create_feature_weights()
        if self.sliding_window is not None:  # last, after a change of form, too: files go by order
            self._add_weights(self.train_geometry, far_offset=far_offset)

    def _create_feature_weights(self) -> None:
        heads, head_dim, num_features = self.num_heads, self.head_dim, self.num_features
        if self.form == "free":
            self._add_weights(
                self.train_geometry or self.train_projection,
                query_kernel=np.zeros((heads, head_dim, num_features)),
                key_kernel=np.zeros((heads, head_dim, num_features)),
                key_bias=np.zeros((heads, num_features)),
            )
            return
        if self.rope_geometry == "planes":
            geometry = np.full((heads, head_dim // 2), self.geometry_scale)
        else:
            identity = self.geometry_scale * np.eye(self.rank, head_dim)
            geometry = np.stack([identity] * heads)
        self._add_weights(self.train_geometry, geometry=geometry)
        if not self.tie_geometry:
            self._add_weights(self.train_geometry, query_geometry=geometry)
        self._add_weights(self.train_projection, projection=self._draw(self.seed))
        if self.form == "centered":
            self._add_weights(
                False,
                proposal=np.ones((heads, self.rank)),
                log_weight=np.zeros((heads, num_features)),
                query_shift=np.zeros((heads, head_dim)),
                key_shift=np.zeros((heads, head_dim)),
            )

    def _add_weights(self, trainable: bool, **values: np.ndarray) -> None:
        for name, value in values.items():
            setattr(self, name, self._add_float32_weight(name, value, trainable))

    def _add_float32_weight(self, name: str, value: np.ndarray, trainable: bool) -> Any:
        # Logits are differences of large numbers: no policy may round these.
        return self.add_weight(
            name=name,
            shape=value.shape,
            dtype="float32",
            autocast=False,
            trainable=trainable,
            initializer=lambda shape, dtype=None: ops.convert_to_tensor(value, dtype=dtype),
        )

    def _draw(self, seed: int | None) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return np.stack(
            [
                draw_projection(self.num_features, self.rank, kind=self.projection_kind, seed=rng)
                for _ in range(self.num_heads)
            ]
        )

    def redraw(self, seed: int | None = None) -> None:
        """Replaces the projection by a new draw; the kernel estimated stays the same.

        Args:
            seed: int, or `None` for a random draw.

        Raises:
            ValueError: if the features are learned or fitted, not drawn, since
                what they have learned would be lost.
        """
        if self.train_projection:
            raise ValueError(
                f"`{self.name}` has `train_projection=True`: `redraw` would throw away "
                "what the projection has learned."
            )
        if self.form == "free":
            raise ValueError(
                f"The features of `{self.name}` were fitted to data, not drawn: there is nothing "
                "to draw anew. Calibrate it with another method."
            )
        self._ensure_built()
        self._set_draw(self._draw(random.randrange(2**31) if seed is None else seed))

    def _set_draw(self, standard: np.ndarray) -> None:
        """W from rows of `N(0, I)`, stretched by the proposal if there is one."""
        if self.form == "centered":
            scale = ops.convert_to_numpy(self.proposal)
            standard = standard * scale[:, None, :]
            log_weight = proposal_log_weight(standard, scale)
            # Features that only fill up a smaller head stay unused.
            before = ops.convert_to_numpy(self.log_weight)
            self.log_weight.assign(np.where(before < UNUSED / 2, UNUSED, log_weight))
        self.projection.assign(standard)

    def matrix(self) -> Any:
        """The geometry M of the keys as a matrix per head, `(num_heads, r, h)`."""
        self._ensure_built()
        if self.form == "free":
            raise ValueError(f"`{self.name}` has free features, which have no geometry.")
        if self.rope_geometry == "planes":
            scales = ops.concatenate([self.geometry, self.geometry], axis=-1)
            return scales[:, :, None] * ops.eye(self.head_dim, dtype="float32")
        return ops.convert_to_tensor(self.geometry)

    def covariance(self) -> Any:
        """The covariance `Sigma = M'M` of the features' directions, `(num_heads, h, h)`.

        Of queries and keys with geometries of their own it is `M_q'M_k`.
        """
        geometry = self.matrix()
        query_geometry = geometry if self.tie_geometry else self.query_geometry
        return ops.einsum("krh,krj->khj", query_geometry, geometry)

    def before_rotation(self, inputs: Any) -> Any:
        """What to rotate: `M x`, or `x` itself with `rope_geometry="after"`.

        Args:
            inputs: queries or keys, `(b, t, n, h)`, n a multiple of `num_heads`.
        """
        self._ensure_built()
        if self.rope_geometry == "after" or self.form == "free":
            return inputs
        if self.rope_geometry == "before":
            return ops.cast(apply_geometry(inputs, self.geometry), inputs.dtype)
        # The members of plane p are p and p + h / 2 in every model's projections;
        # some shuffle them after the rotation, with which these scalars commute.
        scales = ops.concatenate([self.geometry, self.geometry], axis=-1)
        scales = ops.repeat(scales, inputs.shape[2] // self.num_heads, axis=0)
        return ops.multiply(inputs, ops.cast(scales, inputs.dtype))

    def exact_query(self, query: Any) -> Any:
        """The query whose softmax attention to the raw keys is the dark kernel itself.

        `Sigma'(q^ - b) + b`, times `h^(1/4)`: what the features estimate
        attention with. Free features estimate softmax itself.

        Args:
            query: `(b, t, n, h)`, rotated where there is a rotation.
        """
        self._ensure_built()
        if self.form == "free" or self.rope_geometry != "after":
            return query
        shift = None
        if self.form == "centered":
            groups = query.shape[2] // self.num_heads
            shift = ops.repeat(self.query_shift * self.head_dim**0.25, groups, axis=0)
        kernel = ops.swapaxes(self.covariance(), 1, 2)
        moved = ops.cast(query, "float32")
        moved = apply_geometry(moved if shift is None else moved - shift, kernel)
        return ops.cast(moved if shift is None else moved + shift, query.dtype)

    def _feature_arguments(self) -> dict[str, Any]:
        """Arguments of `ops.dark_attention`."""
        parameters = {
            "geometry": self.geometry if self.rope_geometry == "after" else None,
            "projection": self.projection,
            "sliding_window": self.sliding_window,
            "window_only": self.window_only,
        }
        if not self.tie_geometry:
            parameters["query_geometry"] = self.query_geometry
        if self.form == "centered":
            for name in ("log_weight", "query_shift", "key_shift"):
                parameters[name] = getattr(self, name)
        return parameters

    def attend(
        self,
        query: Any,
        key: Any,
        value: Any,
        *,
        causal: bool = False,
        key_mask: Any = None,
        initial_state: Any = None,
        return_state: bool = False,
        chunk_size: int | None = None,
        remat: bool | None = None,
    ) -> Any:
        """`ops.dark_attention` with what this map owns.

        Args:
            query: `(b, t, n, h)`, n a multiple of `num_heads`.
            key: `(b, s, num_heads, h)`.
            value: `(b, s, num_heads, v)`.
            causal: bool.
            key_mask: `(b, s)`, true = attend, or `None`.
            initial_state: state of the keys before, or `None`.
            return_state: bool.
            chunk_size: int or `None`.
            remat: bool or `None`.

        Returns:
            The output `(b, t, n, v)`, with `return_state` also the state.
        """
        self._ensure_built()
        how = {
            "causal": causal,
            "key_mask": key_mask,
            "initial_state": initial_state,
            "return_state": return_state,
            "chunk_size": chunk_size,
            "remat": remat,
        }
        if self.form == "free":
            kernels = (self.query_kernel, self.key_kernel, self.key_bias)
            return feature_attention(query, key, value, *kernels, **how)
        if self.sliding_window is not None:
            how["far_offset"] = self.far_offset
        return dark_attention(query, key, value, **self._feature_arguments(), **how)

    def accumulate(
        self, key: Any, value: Any, *, key_mask: Any = None, initial_state: Any = None
    ) -> Any:
        """The state after these keys: `ops.dark_attention_state` with what this map owns."""
        self._ensure_built()
        how = {"key_mask": key_mask, "initial_state": initial_state}
        if self.form == "free":
            return feature_attention_state(key, value, self.key_kernel, self.key_bias, **how)
        return dark_attention_state(key, value, **self._feature_arguments(), **how)

    def calibrate(
        self,
        query: Any,
        key: Any,
        *,
        method: str = "spectral",
        proposal: str | None = None,
        center: bool | None = None,
        refine: bool = True,
        budget: str = "uniform",
        causal: bool = False,
        query_mask: Any = None,
        key_mask: Any = None,
        max_tokens: int = 16384,
        seed: int = 0,
    ) -> None:
        """Fits the map to queries and keys.

        | `method` | what it sets |
        | --- | --- |
        | `"identity"` | M = I: Performer |
        | `"scale"` | M = alpha I, with an alpha that m features can estimate |
        | `"whitening"` | M = h^(-1/4) L^(-1/2), L the pooled covariance: proposition C.1 |
        | `"spectral"` | M = diag(a) U': features go where the logits come from |
        | `"clusters"` | features fitted to a k-means of the queries (`form="free"`) |
        | `"auto"` | of these the one of least error at held-out positions |

        With `center`, means of queries and keys are taken off and put back
        exactly. `proposal` says where the rows of W come from: `"none"` from
        N(0, I), `"variance_optimal"` from the paper's theorem 3.2, `"spectral"`
        from the minimiser of a bound that always exists; each carries its
        density ratio, so the kernel stays what it is.

        Args:
            query: `(b, t, n, h)`, n a multiple of `num_heads`, as `attend` gets
                them, rotated where there is a rotation.
            key: `(b, s, num_heads, h)`.
            method: one of the above.
            proposal: `None` for the method's own: `"spectral"` for scale and
                spectral, else `"none"`.
            center: bool; `None` for the method's own: true for scale and
                spectral. Clusters always centre.
            refine: bool. Spectral: keeps the best of several draws and fits M
                and a weight per feature to the sample by a few steps of descent
                on KL. Clusters: likewise. False leaves the closed forms.
            budget: `"uniform"`, or `"adaptive"`: features per head by held-out
                error, from a quarter to twice `num_features`, as many in all.
                Tensors have room for the largest head, so this saves nothing
                and costs time; it buys accuracy where heads differ much.
            causal: bool. Whether query t attends to keys up to t.
            query_mask, key_mask: bool, `(b, t)` and `(b, s)`, true = counts.
            max_tokens: int. Tokens of the sample that is refined on.
            seed: int. Of the draw.

        Raises:
            ValueError: if shapes do not fit, queries or keys are not finite or
                all masked, or the proposal does not exist for them.

        References:
            - [Data-Aware Random Feature Kernel for Transformers](https://arxiv.org/abs/2603.04127)
            - [Dense-Exponential Random Features](https://arxiv.org/abs/2302.00787), the spectral
              proposal
        """
        options = CalibrationOptions(
            method=method,
            proposal=proposal,
            center=center,
            refine=refine,
            budget=budget,
            seed=seed,
        )
        options.check(self)
        if self.rope_geometry != "after":
            raise ValueError(
                f'A map with `rope_geometry="{self.rope_geometry}"` is calibrated with its model, '
                "by `keras_darkformer.calibrate`: it takes queries before and after the rotation."
            )
        if self.sliding_window is not None and (
            not causal or query.shape[1] != key.shape[1] or key.shape[1] <= self.sliding_window
        ):
            raise ValueError(
                "A map with a `sliding_window` is calibrated with `causal=True` and on queries and "
                f"keys of one length, longer than the window of {self.sliding_window} tokens. "
                f"Received: causal={causal}, lengths {query.shape[1]} and {key.shape[1]}"
            )
        if self.sliding_window is not None and query.shape[2] != self.num_query_heads:
            raise ValueError(
                f"`query` must have the {self.num_query_heads} heads of `num_query_heads`. "
                f"Received: shape {tuple(query.shape)}"
            )
        positive_integer("max_tokens", max_tokens)
        self._ensure_built()
        statistics = LayerStatistics(self, options.needs_sample(self), max_tokens, seed)
        query, key, query_mask, key_mask = (
            None if x is None else ops.convert_to_numpy(x)
            for x in (query, key, query_mask, key_mask)
        )
        statistics.update(query, key, query_mask=query_mask, key_mask=key_mask, causal=causal)
        fit_feature_map(self, statistics, options).assign(self)
        if self.sliding_window is not None:
            self.far_offset.assign(np.zeros(self.num_query_heads, "float32"))
            mass = FarMass(self)
            mass.add(query, key, query, key, key_mask=key_mask)
            self.far_offset.assign(mass.offset())

    def log_scores(self, query: Any, key: Any) -> Any:
        """Logarithms of the weights `attend` gives keys before it normalises and masks them.

        Quadratic: to train and judge the map with.

        Args:
            query: `(b, t, n, h)`, n a multiple of `num_heads`.
            key: `(b, s, num_heads, h)`.

        Returns:
            `(b, n, t, s)` in float32, up to a constant of each query.
        """
        self._ensure_built()
        if self.form == "free":
            kernels = (self.query_kernel, self.key_kernel, self.key_bias)
            return log_scores(query, key, direct_projections(*kernels))
        arguments = self._feature_arguments()
        for name in ("sliding_window", "window_only"):
            arguments.pop(name)
        feature_map = FeatureMap(**arguments)
        sizes = (self.num_heads, self.head_dim)
        window = None
        if self.sliding_window is not None:
            window = fold_window(
                feature_map,
                *sizes,
                query.shape[2],
                self.sliding_window,
                self.far_offset,
                only=self.window_only,
            )
        return log_scores(query, key, fold_projections(feature_map, *sizes), window)

    def get_initial_state(self, batch_size: Any, value_dim: int | None = None) -> Any:
        """The state before the first token, for values of `value_dim` (`None`: `head_dim`)."""
        return initial_state(
            batch_size,
            self.num_heads,
            self.num_features,
            self.head_dim if value_dim is None else value_dim,
            sliding_window=self.sliding_window,
            head_dim=self.head_dim,
            window_only=self.window_only,
        )

    def call(self, inputs: Any, keys: bool = False) -> Any:
        """The features of `inputs`; see the class."""
        if self.form == "free":
            kernel = self.key_kernel if keys else self.query_kernel
            logits = ops.einsum("bskh,khm->bskm", ops.cast(inputs, "float32"), kernel)
            return ops.exp(logits + self.key_bias if keys else logits)
        geometry = self.matrix() if keys or self.tie_geometry else self.query_geometry
        if self.rope_geometry != "after":  # applied by `before_rotation`
            geometry = ops.broadcast_to(
                ops.eye(self.head_dim, dtype="float32"), tuple(geometry.shape)
            )
        shifts = {}
        if self.form == "centered":
            shifts["log_weight"] = self.log_weight
            shifts["shift"] = self.key_shift if keys else self.query_shift
            shifts["tilt"] = self.query_shift if keys else None
        return dark_features(inputs, geometry, self.projection, **shifts)

    def set_form(self, form: str, num_features: int | None = None) -> None:
        """Gives the map the weights of another form or number of features, at initial values.

        An optimizer built before does not know the new weights.

        Args:
            form: `"random"`, `"centered"` or `"free"`; see the class.
            num_features: int; `None` for as many as there are.
        """
        one_of("form", form, FORMS)
        if num_features is None:
            num_features = self.num_features
        self._ensure_built()
        if (form, num_features) == (self.form, self.num_features):
            return
        before, self.form = self.form, form
        try:
            self._check_options()
        except ValueError:
            self.form = before
            raise
        self.num_features = positive_integer("num_features", num_features)
        self._tracker.unlock()
        try:
            far_offset: Any = None
            if self.sliding_window is not None:
                far_offset = ops.convert_to_numpy(self.far_offset)
            for name in WEIGHTS:
                if hasattr(self, name):
                    self._remove_weight(name)
            trainable = self.trainable
            self._create_weights(far_offset)
            self.trainable = trainable
        finally:
            self._lock_state()

    def _remove_weight(self, name: str) -> None:
        # As `delattr`, which collects garbage after every weight: a second a
        # map in a large program.
        self._untrack_variable(getattr(self, name))
        super(keras.layers.Layer, self).__delattr__(name)

    def _ensure_built(self) -> None:
        if not self.built:
            self.build()

    def compute_output_shape(self, input_shape: Any) -> Any:
        """`(b, s, num_heads, head_dim) -> (b, s, num_heads, num_features)`."""
        return (*input_shape[:-1], self.num_features)

    def compute_output_spec(self, inputs: Any, keys: bool = False) -> Any:
        """Features are float32 under every policy."""
        return keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype="float32")

    def get_config(self) -> dict[str, Any]:
        """All constructor arguments; the seed also where it was drawn."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "num_features": self.num_features,
            "rank": self.rank,
            "projection": self.projection_kind,
            "train_geometry": self.train_geometry,
            "train_projection": self.train_projection,
            "geometry_scale": self.geometry_scale,
            "tie_geometry": self.tie_geometry,
            "rope_geometry": self.rope_geometry,
            "form": self.form,
            "sliding_window": self.sliding_window,
            "window_only": self.window_only,
            "num_query_heads": self.num_query_heads,
            "seed": self.seed,
        }
