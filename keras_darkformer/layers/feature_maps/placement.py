"""Where a geometry sits relative to the rotation of queries and keys by their positions.

One small class for each value of the option `rope_geometry`; without rotary positions it is
`AfterRotation`. What to do before the rotation, what features do after it, and how a head is fitted
follow from the class.
"""

from typing import ClassVar, Protocol

import numpy as np
from keras import ops

from keras_darkformer import fitting
from keras_darkformer.ops import apply_geometry
from keras_darkformer.options import FeatureOptions
from keras_darkformer.types import Tensor


class Placement(Protocol):
    """What a feature map has to know of its geometry's place."""

    name: ClassVar[str]
    fitter: fitting.HeadFitter
    needs_rotation: bool

    def check(self, options: FeatureOptions, head_dim: int) -> None:
        """Raises a ValueError if options exclude each other."""

    def initial(self, num_heads: int, rank: int, head_dim: int, scale: float) -> np.ndarray:
        """The geometry's first value, `(k, ...)`."""

    def before_rotation(self, inputs: Tensor, geometry: Tensor) -> Tensor:
        """What of `(b, t, n, h)` is rotated."""

    def of_features(self, geometry: Tensor) -> Tensor:
        """The geometry that features apply after the rotation, `(k, r, h)`; `None` for none."""

    def matrix(self, geometry: Tensor) -> Tensor:
        """The geometry as a matrix per head, `(k, r, h)`."""


class AfterRotation:
    """A geometry of any shape, applied by the features themselves."""

    name: ClassVar[str] = "after"

    fitter: fitting.HeadFitter = fitting.AfterRotation()
    needs_rotation = False

    def check(self, options: FeatureOptions, head_dim: int) -> None:
        """Nothing is excluded."""

    def initial(self, num_heads: int, rank: int, head_dim: int, scale: float) -> np.ndarray:
        """The identity, `(k, r, h)`, times the scale."""
        return np.stack([scale * np.eye(rank, head_dim)] * num_heads)

    def before_rotation(self, inputs: Tensor, geometry: Tensor) -> Tensor:
        """The inputs."""
        return inputs

    def of_features(self, geometry: Tensor) -> Tensor:
        """The geometry."""
        return geometry

    def matrix(self, geometry: Tensor) -> Tensor:
        """The geometry."""
        return ops.convert_to_tensor(geometry)


class BeforeRotation(AfterRotation):
    """A geometry of any shape, which sees tokens before they are rotated."""

    name = "before"
    fitter: fitting.HeadFitter = fitting.BeforeRotation()
    needs_rotation = True

    def check(self, options: FeatureOptions, head_dim: int) -> None:
        """One geometry, of full rank, and channels in pairs."""
        if not options.tie_geometry or options.rank not in (None, head_dim):
            raise ValueError(
                f'`rope_geometry="{self.name}"` needs `tie_geometry=True` and a full `rank`. '
                f"Received: tie_geometry={options.tie_geometry}, rank={options.rank}"
            )
        if head_dim % 2:
            raise ValueError(
                f'`rope_geometry="{self.name}"` needs an even `head_dim`. '
                f"Received: head_dim={head_dim}"
            )

    def before_rotation(self, inputs: Tensor, geometry: Tensor) -> Tensor:
        """`M x`."""
        return ops.cast(apply_geometry(inputs, geometry), inputs.dtype)

    def of_features(self, geometry: Tensor) -> Tensor:
        """None."""
        return None


class RotaryPlanes(BeforeRotation):
    """One scalar per rotary plane, `(k, h / 2)`: it commutes with the rotation."""

    name = "planes"
    fitter: fitting.HeadFitter = fitting.RotaryPlanes()

    def initial(self, num_heads: int, rank: int, head_dim: int, scale: float) -> np.ndarray:
        """The scale, for every plane."""
        return np.full((num_heads, head_dim // 2), scale)

    def before_rotation(self, inputs: Tensor, geometry: Tensor) -> Tensor:
        """Every channel times the scalar of its plane.

        The members of plane p are p and p + h / 2 in every model's projections. Some shuffle them
        after the rotation, with which the scalars commute.
        """
        scales = ops.concatenate([geometry, geometry], axis=-1)
        scales = ops.repeat(scales, inputs.shape[2] // geometry.shape[0], axis=0)
        return ops.multiply(inputs, ops.cast(scales, inputs.dtype))

    def matrix(self, geometry: Tensor) -> Tensor:
        """A diagonal one."""
        scales = ops.concatenate([geometry, geometry], axis=-1)
        return scales[:, :, None] * ops.eye(scales.shape[-1], dtype="float32")


_PLACEMENTS: dict[str, Placement] = {
    placement.name: placement for placement in (AfterRotation(), BeforeRotation(), RotaryPlanes())
}


def placement_of(options: FeatureOptions) -> Placement:
    """The placement that options ask for."""
    return _PLACEMENTS[options.rope_geometry]
