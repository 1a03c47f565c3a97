"""Where a geometry sits relative to the rotation of queries and keys by their positions.

There is one small class for each value of the option `rope_geometry`; without rotary positions it
is `AfterRotation`. What to do before the rotation, what features do after it, and how a head is
fitted follow from the class.
"""

from keras import ops

from keras_darkformer import fitting
from keras_darkformer.ops import apply_geometry
from keras_darkformer.options import FeatureOptions
from keras_darkformer.types import Tensor


class AfterRotation:
    """A geometry of any shape, applied by the features themselves."""

    name = "after"
    fitter: fitting.HeadFitter = fitting.AfterRotation()
    needs_rotation = False

    def check(self, options: FeatureOptions, head_dim: int) -> None:
        """Raises a ValueError if options exclude each other."""

    def before_rotation(self, inputs: Tensor, geometry: Tensor) -> Tensor:
        """What is rotated in place of `(b, t, n, h)`: the inputs themselves."""
        return inputs

    def of_features(self, geometry: Tensor) -> Tensor:
        """The geometry that features apply after the rotation, `(k, r, h)`; `None` for none."""
        return geometry


class BeforeRotation(AfterRotation):
    """A geometry of any shape, which sees tokens before they are rotated."""

    name = "before"
    fitter: fitting.HeadFitter = fitting.BeforeRotation()
    needs_rotation = True

    def check(self, options: FeatureOptions, head_dim: int) -> None:
        """Raises a ValueError unless there is one geometry of full rank and an even head size."""
        if not options.tie_geometry or options.rank not in (None, head_dim):
            raise ValueError(
                '`rope_geometry="before"` needs `tie_geometry=True` and a full `rank`. '
                f"Received: tie_geometry={options.tie_geometry}, rank={options.rank}"
            )
        if head_dim % 2:
            raise ValueError(
                f'`rope_geometry="before"` needs an even `head_dim`. Received: head_dim={head_dim}'
            )

    def before_rotation(self, inputs: Tensor, geometry: Tensor) -> Tensor:
        """What is rotated in place of `(b, t, n, h)`: `M x`."""
        return ops.cast(apply_geometry(inputs, geometry), inputs.dtype)

    def of_features(self, geometry: Tensor) -> Tensor:
        """`None`: features apply no geometry after the rotation."""
        return None


_PLACEMENTS = {placement.name: placement for placement in (AfterRotation(), BeforeRotation())}


def placement_of(options: FeatureOptions) -> AfterRotation:
    """The placement that options ask for."""
    return _PLACEMENTS[options.rope_geometry]
