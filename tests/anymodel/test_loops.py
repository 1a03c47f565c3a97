"""Converted models in training loops of each backend's own."""

import numpy as np
import pytest
from backends import BACKEND, to_numpy

from keras_darkformer import convert_to_dark

from .models import MODELS, X, dark_layers_of, outputs

STEPS = 5


def tensorflow_loop(model, target):
    import tensorflow as tf

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(X) - target) ** 2)
        variables = [v.value for v in model.trainable_variables]
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(0.1 * gradient)
        return loss

    return [float(step()) for _ in range(STEPS)]


def jax_loop(model, target):
    import jax

    rest = [v.value for v in model.non_trainable_variables]

    def loss_of(weights):
        found, _ = model.stateless_call(weights, rest, X)
        return ((found - target) ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss_of))
    weights, losses = [v.value for v in model.trainable_variables], []
    for _ in range(STEPS):
        loss, gradients = step(weights)
        weights = [w - 0.1 * g for w, g in zip(weights, gradients, strict=True)]
        losses.append(float(loss))
    for variable, value in zip(model.trainable_variables, weights, strict=True):
        variable.assign(value)
    return losses


def torch_loop(model, target):
    import torch

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = ((model(X) - torch.from_numpy(target)) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


LOOPS = {"tensorflow": tensorflow_loop, "jax": jax_loop, "torch": torch_loop}


@pytest.mark.parametrize("which", MODELS)
def test_a_loop_of_the_backend_trains_a_converted_model(which):
    model = convert_to_dark(MODELS[which](), num_features=8)
    target = np.ones_like(outputs(model, X))
    before = [to_numpy(x.feature_map.geometry) for x in dark_layers_of(model)]
    losses = LOOPS[BACKEND](model, target)
    assert losses[-1] < 0.9 * losses[0]
    assert abs(((outputs(model, X) - target) ** 2).mean() - losses[-1]) < losses[0]
    for layer, geometry in zip(dark_layers_of(model), before, strict=True):
        assert np.abs(to_numpy(layer.feature_map.geometry) - geometry).max() > 0
