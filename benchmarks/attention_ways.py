"""The ways to compute attention that attention.py compares, on the same random inputs.

- dark: `ops.dark_attention` with a geometry that is trained;
- dark_identity: the same with `geometry=None`, where Performer is the peer;
- dark_auto: what a layer with `attention_mode="auto"` computes in inference: the
  kernel itself or `dark`, by the length;
- dark_remat: the same as dark with `remat` turned the other way than its default;
- darkformer_pytorch_C: darkformer-pytorch with `causal_chunk_size=C` (256 is
  its default), its geometry trained too;
- performer_pytorch: performer-pytorch's `FastAttention`, whose projection is
  not trained;
- fla: the chunked form in plain PyTorch of flash-linear-attention's tests, whose
  features are `elu(x) + 1`; fla_kernel: its fused kernel, which needs a GPU;
- sdpa: torch's `scaled_dot_product_attention`; cudnn: `jax.nn`'s on a GPU;
- keras: `keras.ops.dot_product_attention`;
- matmul: the product of two matrices of 1,024 x 1,024, the machine's rate;
- layer_dark, layer_keras: `DarkAttention`, and Keras' `MultiHeadAttention` or
  `GroupQueryAttention`.

Each gets its inputs in the layout it likes, keys and values repeated for the
query heads beforehand where it knows no groups. Gradients are those by queries,
keys, values and what is trained.
"""

import functools
import importlib.util
import pathlib

from common import accelerator, backend, compiled

CHUNKS = (64, 128, 256, 512)
MATMUL = 1024

# === The ways ===


class Way:
    """A function, its inputs, and the weights that are trained: arguments, or a module's own."""

    def __init__(self, function, inputs, trained=()):
        self.function, self.inputs, self.trained = function, inputs, list(trained)


def ways_of(shape, length, causal, names=None, dtype="float32", compile=False):
    """The ways this backend has, by name, on the same random inputs; `names`: only these."""
    import numpy as np
    from keras import ops

    from keras_darkformer.ops import (
        apply_geometry,
        dark_attention,
        draw_projection,
        exact_dark_attention,
    )
    from keras_darkformer.ops.crossover import crossover

    heads, kv_heads, head_dim = shape["heads"], shape["kv_heads"], shape["head_dim"]
    rng, batch = np.random.default_rng(0), shape.get("batch", 1)

    def draw(count):
        array = rng.standard_normal((batch, length, count, head_dim), dtype="float32")
        return ops.convert_to_tensor(array, dtype=dtype)

    query, key, value = draw(heads), draw(kv_heads), draw(kv_heads)
    projection = draw_projection(shape["num_features"], head_dim, seed=0)
    projection = ops.convert_to_tensor(projection, dtype="float32")
    geometry = ops.convert_to_tensor(np.stack([np.eye(head_dim)] * kv_heads), dtype="float32")

    def dark(query, key, value, geometry=None, **options):
        return dark_attention(query, key, value, geometry, projection, causal=causal, **options)

    def exact(query, key, value, geometry):
        kernel = ops.einsum("krh,krj->khj", geometry, geometry)
        query = ops.cast(apply_geometry(query, kernel), query.dtype)
        return exact_dark_attention(query, key, value, causal=causal)

    sizes = head_dim, shape["num_features"], heads // kv_heads
    dark_auto = exact if length < crossover(*sizes, causal=causal) else dark

    def dark_remat(*tensors):  # JAX does it by default
        return dark(*tensors, remat=backend() != "jax")

    def keras_attention(query, key, value):
        return ops.dot_product_attention(query, key, value, is_causal=causal)

    def wide(tensor):
        return ops.repeat(tensor, heads // kv_heads, axis=2)

    plain = [query, key, value]
    makers = {
        "dark": lambda: Way(dark, plain, [geometry]),
        "dark_auto": lambda: Way(dark_auto, plain, [geometry]),
        "dark_remat": lambda: Way(dark_remat, plain, [geometry]),
        "keras": lambda: Way(keras_attention, [query, wide(key), wide(value)]),
    }
    if not causal:
        makers["dark_identity"] = lambda: Way(dark, plain)
    if backend() == "jax" and accelerator():

        def cudnn(query, key, value):
            import jax

            return jax.nn.dot_product_attention(
                query, key, value, is_causal=causal, implementation="cudnn"
            )

        makers["cudnn"] = lambda: Way(cudnn, plain)
    if backend() == "torch":
        makers |= torch_ways(shape, causal, plain, wide, compile)
    return {name: make() for name, make in makers.items() if names is None or name in names}


def torch_ways(shape, causal, plain, wide, compile):
    import torch
    from darkformer_pytorch.attention import DarkformerKernelAttention
    from performer_pytorch.performer_pytorch import FastAttention
    from torch.nn import functional

    query, key, value = plain
    sizes = {"head_dim": shape["head_dim"], "num_features": shape["num_features"]}

    def head_first(*tensors):
        return [tensor.transpose(1, 2).contiguous() for tensor in tensors]

    def sdpa(query, key, value):
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
        )

    def darkformer(chunk):
        module = DarkformerKernelAttention(
            num_heads=shape["heads"],
            causal=causal,
            causal_chunk_size=chunk,
            projection_seed=0,
            **sizes,
        ).to(query.device, query.dtype)
        module = module.eval()
        function = torch.compile(module) if compile else module
        return Way(function, head_first(query, wide(key), wide(value)), module.parameters())

    def performer():
        module = FastAttention(
            shape["head_dim"], nb_features=shape["num_features"], causal=causal
        ).to(query.device)
        return Way(module, head_first(query, wide(key), wide(value)))

    def fla(attention):
        def function(query, key, value):
            query, key = functional.elu(query) + 1, functional.elu(key) + 1
            return attention(query, key, value, normalize=True)

        return Way(function, [query, wide(key), wide(value)])

    def fla_kernel():
        from fla.ops.linear_attn import chunk_linear_attn

        return fla(lambda *tensors, **options: chunk_linear_attn(*tensors, **options)[0])

    flas = {}
    if causal and (module := fla_module()):
        flas["fla"] = lambda: fla(module.naive_chunk_linear_attn)
        if accelerator():
            flas["fla_kernel"] = fla_kernel

    chunks = CHUNKS if causal else (256,)
    return {
        **flas,
        "sdpa": lambda: Way(sdpa, head_first(query, key, value)),
        "performer_pytorch": performer,
        **{f"darkformer_pytorch_{c}": lambda c=c: darkformer(c) for c in chunks},
    }


def layer_ways(shape, length, dtype="float32"):
    """Self-attention layers, projections included."""
    import keras
    import numpy as np
    from keras import ops

    from keras_darkformer import DarkAttention

    heads, kv_heads, head_dim = shape["heads"], shape["kv_heads"], shape["head_dim"]
    array = np.random.default_rng(0).standard_normal((1, length, heads * head_dim), "float32")
    inputs = ops.convert_to_tensor(array, dtype=dtype)
    if heads == kv_heads:
        theirs = keras.layers.MultiHeadAttention(heads, head_dim, dtype=dtype)
    else:
        theirs = keras.layers.GroupQueryAttention(head_dim, heads, kv_heads, dtype=dtype)
    ours = DarkAttention(
        head_dim,
        heads,
        kv_heads,
        num_features=shape["num_features"],
        dtype=dtype,
    )
    theirs.build(inputs.shape, inputs.shape)
    ours.build(inputs.shape, inputs.shape)

    def of_layer(layer):
        """Its output, and its gradients by the inputs and all trainable weights."""

        def function(inputs, *weights):
            if backend() == "torch":
                return layer(inputs, inputs, use_causal_mask=True)
            weights, others = list(weights), [v.value for v in layer.non_trainable_variables]
            return layer.stateless_call(weights, others, inputs, inputs, use_causal_mask=True)[0]

        weights = [variable.value for variable in layer.trainable_variables]
        return Way(function, [inputs], weights)

    return {
        "layer_dark": of_layer(ours),
        "layer_keras": of_layer(theirs),
    }


@functools.cache
def fla_module():
    """A file of flash-linear-attention, if that is installed: the package asks for Triton."""
    if (found := importlib.util.find_spec("fla")) is None:
        return None
    path = pathlib.Path(found.origin).parent / "ops" / "linear_attn" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# === Running them ===


def runner(way, gradients, *, compile=False):
    """A function without arguments that computes the way's output, or its gradients."""
    arguments = [*way.inputs, *way.trained]
    if backend() == "torch":
        return torch_runner(way, gradients, compile)
    function = gradient_function(way) if gradients else compiled(way.function)
    return lambda: function(*arguments)


def gradient_function(way):
    """Gradients by inputs and weights, given one by the output: ones."""
    if backend() == "jax":
        import jax
        from jax import numpy as jnp

        def gradient(*arguments):
            output, backward = jax.vjp(way.function, *arguments)
            return backward(jnp.ones_like(output))

        return jax.jit(gradient)

    import tensorflow as tf

    @tf.function(jit_compile=True)
    def gradient(*arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            output = way.function(*arguments)
        return tape.gradient(output, arguments, unconnected_gradients="zero")

    return gradient


def torch_runner(way, gradients, compile):
    import torch

    own = bool(way.trained) and isinstance(way.trained[0], torch.nn.Parameter)
    function = compiled(way.function, compile=compile)
    weights = [weight.detach().requires_grad_(gradients) for weight in way.trained]
    if own:
        weights = [weight for weight in way.trained if weight.requires_grad]

    def run():
        inputs = [tensor.detach().requires_grad_(gradients) for tensor in way.inputs]
        with torch.set_grad_enabled(gradients):
            output = function(*inputs, *([] if own else weights))
        if not gradients:
            return output
        return torch.autograd.grad(
            output, [*inputs, *weights], torch.ones_like(output), allow_unused=True
        )

    return run


def matmul_way():
    import numpy as np
    from keras import ops

    array = np.random.default_rng(0).standard_normal((MATMUL, MATMUL)).astype("float32")
    return Way(lambda x: x @ x, [ops.convert_to_tensor(array)])
