"""The models of `study.py`: which attention, what is trained, from where."""

import keras
import keras_hub
import models
import numpy as np
import teacher
from study_training import values

import keras_darkformer as kd

PAPER = {"geometry_scale": 1.0}
PERFORMER = PAPER | {"train_geometry": False}
LEARNED = PERFORMER | {"train_projection": True}
# How attention is made linear; `None` leaves it exact. "redrawn" draws features anew every so many
# steps, "calibrated" starts from `calibrate`, or where there is no trained model to fit to, from
# the package's own default.
ARMS = {
    "exact": None,
    "DARKFormer": PAPER,
    "DARKFormer, redrawn": PAPER,
    "Performer": PERFORMER,
    "Performer, redrawn": PERFORMER,
    "learned features": LEARNED,
    "uniform": PERFORMER,
    "calibrated": {"tie_geometry": False},
}
REGIMES = ("from scratch", "all weights", "q, k, v")
SMOLLM2 = "SmolLM2"  # a shape of its own: a decoder trained by others
CALIBRATION_WINDOWS = 32


def is_redrawn(arm):
    return arm.endswith("redrawn")


class Maker:
    """Makes the models of one arm.

    Args:
        run: `study.Run`.
        preset: of the trained exact model.
        tokens: of the training part of the text that it is finetuned on.
    """

    def __init__(self, run, preset, tokens):
        self.run, self.preset, self.tokens = run, preset, tokens

    def model(self, seed):
        """The model before training."""
        run = self.run
        keras.utils.set_random_seed(seed)
        if run.shape == SMOLLM2:
            from pretrained import smollm2

            model = smollm2()[0]
        elif run.regime == "from scratch":
            model = models.gemma(vocabulary_size=teacher.VOCABULARY, **models.SHAPES[run.shape])
        else:
            model = keras_hub.models.CausalLM.from_preset(self.preset)
        if ARMS[run.arm] is None:
            return model
        kd.convert_to_dark(model, num_features=run.num_features, seed=seed, **ARMS[run.arm])
        if run.arm == "calibrated" and run.regime != "from scratch":
            windows = teacher.text_windows(
                self.tokens, CALIBRATION_WINDOWS, teacher.LENGTH, 10_000 + seed
            )
            kd.calibrate(model, teacher.inputs(windows), seed=seed, verbose=False)
        if run.arm == "uniform":
            for layer in models.dark_layers(model):
                geometry = layer.feature_map.geometry
                geometry.assign(np.zeros(geometry.shape))
        return model

    def trained(self, model):
        """The variables that this regime trains."""
        if self.run.regime != "q, k, v":
            return list(model.trainable_variables)
        parts = ("query/kernel", "key/kernel", "value/kernel")
        return [
            variable
            for variable in model.trainable_variables
            if "/feature_map/" in variable.path or variable.path.endswith(parts)
        ]

    def weights(self, model):
        """Values of what is trained, and of the rest."""
        return values(model.trainable_variables), values(model.non_trainable_variables)

    def draws(self, model, seed):
        """New random features, by the place of their variables among those not trained."""
        places = {id(variable): i for i, variable in enumerate(model.non_trainable_variables)}
        found = {}
        for number, layer in enumerate(models.dark_layers(model)):
            layer.feature_map.redraw(int(1000 * seed + number))
            projection = layer.feature_map.projection
            found[places[id(projection)]] = np.asarray(projection.value)
        return found
