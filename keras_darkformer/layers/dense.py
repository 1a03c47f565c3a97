"""The options of the dense layers of attention, defined once."""

import dataclasses
from typing import Any, Self

import keras

from keras_darkformer.types import Config, Layer, Shape

# Keras' modules that turn names and configs into objects, by how an argument's name ends.
_MODULES = {
    "initializer": keras.initializers,
    "regularizer": keras.regularizers,
    "constraint": keras.constraints,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseOptions:
    """Arguments of the projections, as in `keras.layers.GroupQueryAttention`."""

    use_bias: bool = True
    kernel_initializer: Any = "glorot_uniform"
    bias_initializer: Any = "zeros"
    kernel_regularizer: Any = None
    bias_regularizer: Any = None
    activity_regularizer: Any = None
    kernel_constraint: Any = None
    bias_constraint: Any = None

    def __post_init__(self) -> None:
        """Turns names and configs into objects."""
        for name, module in self._modules().items():
            object.__setattr__(self, name, module.get(getattr(self, name)))

    @classmethod
    def _modules(cls) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(cls)]
        endings = {name: name.rsplit("_", 1)[-1] for name in names}
        return {name: _MODULES[end] for name, end in endings.items() if end in _MODULES}

    @classmethod
    def split(cls, arguments: Config) -> tuple[Self, Config]:
        """Splits keyword arguments into these options and the others."""
        others = dict(arguments)
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: others.pop(name) for name in names if name in others}), others

    def einsum(self, equation: str, output_shape: Shape, bias_axes: str, **kwargs: Any) -> Layer:
        """An `EinsumDense` with these options."""
        dense = keras.layers.EinsumDense(
            equation,
            output_shape=output_shape,
            bias_axes=bias_axes if self.use_bias else None,
            **{name: _fresh(getattr(self, name)) for name in self._modules()},
            **kwargs,
        )
        # The layer around it handles masks, so its parts need not warn that they do not.
        dense.supports_masking = True
        return dense

    def get_config(self) -> Config:
        """All options, in a form that JSON can hold."""
        config = {
            name: module.serialize(getattr(self, name)) for name, module in self._modules().items()
        }
        return {"use_bias": self.use_bias, **config}


def _fresh(value: Any) -> Any:
    """A seeded initializer used twice would give the same values twice."""
    if isinstance(value, keras.initializers.Initializer):
        return value.__class__.from_config(value.get_config())
    return value
