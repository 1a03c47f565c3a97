"""Layout maps for model-parallel training: the stock model's, extended by the feature maps."""

from typing import Any

import keras

from keras_darkformer.hub.backbone import DarkBackbone
from keras_darkformer.hub.family import Family

# Paths of a feature map's weights, all of which have heads along their first axis.
FEATURE_MAPS = ".*/feature_map/[^/]+"
KEY_KERNELS = ".*attention/(key|value)/kernel"


class ShardedBackbone(DarkBackbone):
    """A dark backbone whose stock class says how its weights are sharded."""

    family: Family

    @classmethod
    def get_layout_map(
        cls,
        device_mesh: Any,
        model_parallel_dim_name: str = "model",
        data_parallel_dim_name: str = "batch",
        num_key_value_heads: int | None = None,
    ) -> Any:
        """The stock backbone's `LayoutMap`, extended by the feature maps.

        Every weight of a feature map is split by its heads, as the stock map splits the
        attention's.

        The stock maps assume that the key/value heads can be split evenly, and JAX refuses to build
        models where they can't, such as Gemma 2B with its single head. Pass `num_key_value_heads`
        for these: weights that can't be split by heads are then kept whole on every device, which
        costs little for so few heads. All other layouts stay the same.

        Set the distribution before the model is created, and keep it set during conversion and
        calibration: new weights take their layout from it.

        Args:
            device_mesh: `keras.distribution.DeviceMesh`.
            model_parallel_dim_name: the mesh's axis that weights are split along.
            data_parallel_dim_name: its axis that data are split along.
            num_key_value_heads: int. Key/value heads of the model. `None` assumes that they can be
                split.

        Returns:
            `keras.distribution.LayoutMap`.

        Raises:
            ValueError: if `device_mesh` is not a `DeviceMesh` or lacks an axis.

        Example:

            mesh = keras.distribution.DeviceMesh(
                (1, 8), ("batch", "model"), keras.distribution.list_devices())
            layout_map = DarkGemmaBackbone.get_layout_map(mesh, num_key_value_heads=1)
            distribution = keras.distribution.ModelParallel(
                layout_map=layout_map, batch_dim_name="batch")
            with distribution.scope():
                model = DarkGemmaCausalLM.from_preset("gemma_2b_en", num_features=256)
        """
        stock = cls.stock_cls.get_layout_map(
            device_mesh, model_parallel_dim_name, data_parallel_dim_name
        )
        sizes = dict(zip(device_mesh.axis_names, device_mesh.shape, strict=True))

        def splits(axis: str | None) -> bool:
            return axis is None or not num_key_value_heads or num_key_value_heads % sizes[axis] == 0

        ours = {
            FEATURE_MAPS: (model_parallel_dim_name if splits(model_parallel_dim_name) else None,)
        }
        kernel = list(next(x for pattern, x in stock.items() if "key" in pattern).axes)
        if not splits(kernel[cls.family.kernel_heads_axis]):
            kernel[cls.family.kernel_heads_axis] = None
            ours[KEY_KERNELS] = tuple(kernel)
        # A path that two patterns match is an error, and the stock patterns, whose dots match any
        # character, take feature_map/query_kernel for query/kernel.
        others = "".join(f"(?!{pattern}$)" for pattern in ours)
        layout_map = keras.distribution.LayoutMap(device_mesh)
        for pattern, layout in stock.items():
            layout_map[f"{others}(?:{pattern})" if "*" in pattern else pattern] = layout.axes
        for pattern, axes in ours.items():
            layout_map[pattern] = axes
        return layout_map
