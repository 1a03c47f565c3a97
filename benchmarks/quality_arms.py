"""The arms of quality.py: the ways to convert the teacher and to train it again."""

import keras
import keras_hub
import models
import numpy as np
import teacher

import keras_darkformer as kd

LENGTH, BATCH = teacher.LENGTH, 8
CALIBRATION_WINDOWS, VALIDATION_WINDOWS = 32, 16
TRANSFER_STEPS, DISTIL_STEPS = 100, 300
TRANSFER_RATES, FINETUNE_RATES = (3e-3, 1e-2), (1e-3, 3e-3)
WINDOW = 32
FARTHEST = 4 * LENGTH


class Setting:
    """What an arm is given: the teacher, the text, a seed and a rate."""

    def __init__(self, args, shape, seed, rate):
        self.preset = args.presets[shape]
        self.tokens = args.tokens
        self.seed, self.rate = seed, rate
        self.transfer_steps = 2 if args.quick else TRANSFER_STEPS
        self.distil_steps = 2 if args.quick else DISTIL_STEPS
        self.num_features = 256 if shape == "h256" else 64

    def exact(self):
        return keras_hub.models.CausalLM.from_preset(self.preset)

    def converted(self, **options):
        options = {"num_features": self.num_features, "geometry_scale": 1.0} | options
        return kd.convert_to_dark(self.exact(), seed=self.seed, **options)

    def windows(self, count, stream, part="train"):
        """Windows of text and repeats, different ones for every stream."""
        return teacher.training_windows(self.tokens[part], count, LENGTH, 1000 * stream + self.seed)

    def batches(self, count, stream, part="train"):
        windows = self.windows(count * BATCH, stream, part)
        return [
            teacher.inputs(windows[start : start + BATCH])
            for start in range(0, len(windows), BATCH)
        ]

    def calibrate(self, model, method="spectral", **options):
        data = self.batches(CALIBRATION_WINDOWS // BATCH, 1)
        return kd.calibrate(model, data, method=method, seed=self.seed, verbose=False, **options)

    def transfer(self, model, steps=None, **options):
        steps = steps or self.transfer_steps
        kd.transfer_attention(
            model,
            self.batches(steps, 2),
            steps=steps,
            learning_rate=self.rate,
            validation_data=self.batches(VALIDATION_WINDOWS // BATCH, 4, "validation"),
            seed=self.seed,
            verbose=0,
            **options,
        )
        return model

    def distil(self, model):
        data, steps = self.batches(self.distil_steps, 3), self.distil_steps
        kd.distil(model, self.exact(), data, steps=steps, learning_rate=self.rate, verbose=0)
        return model

    def finetune(self, model):
        """q, k, v and what is trainable of the feature maps, on the next token alone."""
        windows = self.windows(self.distil_steps * BATCH, 3)
        chosen = []
        for layer in models.dark_layers(model):
            chosen += layer.feature_map.trainable_variables
            for dense in (layer.query_dense, layer.key_dense, layer.value_dense):
                chosen += dense.variables
        schedule = keras.optimizers.schedules.CosineDecay(self.rate, self.distil_steps)
        with models.only_trainable(model, chosen):
            model.compile(
                optimizer=keras.optimizers.AdamW(schedule, weight_decay=0.0, clipnorm=1.0),
                loss=teacher.loss(),
                weighted_metrics=[],
            )
            model.fit(
                teacher.inputs(windows), windows[:, 1:], batch_size=BATCH, shuffle=False, verbose=0
            )
        return model


def performer(setting, **options):
    return setting.converted(train_geometry=False, **options)


def untrained(method, **options):
    return lambda setting: setting.calibrate(setting.converted(), method, **options)


def transferred(setting, **options):
    """Calibrated and transferred, queries and keys with geometries of their own."""
    return setting.transfer(setting.calibrate(setting.converted(tie_geometry=False, **options)))


def distilled(setting):
    """Transfer at its own best rate, distillation at the rate that is tried."""
    rate, setting.rate = setting.rate, TRANSFER_RATES[-1]
    model = transferred(setting)
    setting.rate = rate
    return setting.distil(model)


def learned_features(setting):
    return setting.transfer(setting.converted(train_geometry=False, train_projection=True))


def hedgehog(setting):
    """`phi(x) = [exp(W x), exp(-W x)]` for queries and for keys, all of it learned."""
    model = setting.converted(feature_map="exponential")
    for layer in models.dark_layers(model):
        feature_map = layer.feature_map
        heads, dim, m = feature_map.query_kernel.shape
        rows = np.linalg.qr(np.random.default_rng(setting.seed).normal(size=(dim, dim)))[0]
        half = rows[:, : m // 2] * dim**-0.25
        kernel = np.stack([np.concatenate([half, -half], axis=1)] * heads)
        feature_map.query_kernel.assign(kernel)
        feature_map.key_kernel.assign(kernel)
        feature_map.key_bias.assign(np.zeros((heads, m)))
    return setting.transfer(model)


def rotary(rope_geometry, offsets):
    def arm(setting):
        model = setting.converted(rope_geometry=rope_geometry)
        how = {"position_offset": FARTHEST - LENGTH} if offsets else {}
        setting.calibrate(model, **how)
        return setting.transfer(model, **how)

    return arm


def windowed(setting, **options):
    return performer(setting, sliding_window=WINDOW, **options)


def window_calibrated(setting):
    model = setting.converted(sliding_window=WINDOW, tie_geometry=False)
    return setting.calibrate(model)


def window_transferred(setting):
    rate, setting.rate = setting.rate, TRANSFER_RATES[-1]
    model = setting.transfer(window_calibrated(setting))
    setting.rate = rate
    return model


# Memories of 64 tokens, and what more tokens and what features of as many bytes add.
WINDOWED = {"sliding_window": 60, "num_sinks": 4}
KEPT = {"sliding_window": 32, "num_sinks": 4, "cache_size": 28}


def memory_alone(**memory):
    return lambda setting: setting.converted(feature_map="none", **memory)


def kept_calibrated(setting):
    return setting.calibrate(setting.converted(tie_geometry=False, **KEPT))


# name: (what, the rates tried, the shape)
ARMS = {
    "exact": (lambda setting: setting.exact(), (), "h64"),
    "performer": (performer, (), "h64"),
    "whitening": (untrained("whitening"), (), "h64"),
    "scale": (untrained("scale"), (), "h64"),
    "spectral, closed form": (untrained("spectral", refine=False), (), "h64"),
    "spectral": (untrained("spectral"), (), "h64"),
    "clusters": (untrained("clusters"), (), "h64"),
    "spectral + transfer": (transferred, TRANSFER_RATES, "h64"),
    "spectral + transfer + distillation": (distilled, FINETUNE_RATES, "h64"),
    "performer + distillation": (lambda s: s.distil(performer(s)), FINETUNE_RATES, "h64"),
    "learned features + transfer": (learned_features, TRANSFER_RATES, "h64"),
    "hedgehog + transfer": (hedgehog, TRANSFER_RATES, "h64"),
    "identity, finetuned": (lambda s: s.finetune(s.converted()), FINETUNE_RATES, "h64"),
    "performer, finetuned": (lambda s: s.finetune(performer(s)), FINETUNE_RATES, "h64"),
    "window alone": (memory_alone(sliding_window=WINDOW), (), "h64"),
    "window + performer": (windowed, (), "h64"),
    "window + spectral": (window_calibrated, (), "h64"),
    "window + spectral + transfer": (
        lambda s: s.transfer(window_calibrated(s)),
        TRANSFER_RATES,
        "h64",
    ),
    "window + spectral + 4x transfer": (
        lambda s: s.transfer(window_calibrated(s), 4 * s.transfer_steps),
        TRANSFER_RATES[-1:],
        "h64",
    ),
    "window + spectral + transfer + distillation": (
        lambda s: s.distil(window_transferred(s)),
        FINETUNE_RATES[:1],
        "h64",
    ),
    "memory: window 64": (memory_alone(sliding_window=64), (), "h64"),
    "memory: window 60, 4 sinks": (memory_alone(**WINDOWED), (), "h64"),
    "memory: window 32, 4 sinks, 28 kept": (memory_alone(**KEPT), (), "h64"),
    "memory: window 124, 4 sinks": (
        memory_alone(sliding_window=124, num_sinks=4),
        (),
        "h64",
    ),
    "memory: window 32, 4 sinks, 28 kept, spectral": (kept_calibrated, (), "h64"),
    "memory: window 32, 4 sinks, 28 kept, spectral + transfer": (
        lambda s: s.transfer(kept_calibrated(s)),
        TRANSFER_RATES[-1:],
        "h64",
    ),
    "memory: window 60, 4 sinks + distillation": (
        lambda s: s.distil(memory_alone(**WINDOWED)(s)),
        FINETUNE_RATES[:1],
        "h64",
    ),
    "memory: window 32, 4 sinks, 28 kept + distillation": (
        lambda s: s.distil(memory_alone(**KEPT)(s)),
        FINETUNE_RATES[:1],
        "h64",
    ),
    **{
        f"m = {m}: {name}": (arm, rates, "h64")
        for m in (32, 128, 256)
        for name, arm, rates in (
            ("performer", lambda s, m=m: performer(s, num_features=m), ()),
            ("spectral", lambda s, m=m: s.calibrate(s.converted(num_features=m)), ()),
            (
                "spectral + transfer",
                lambda s, m=m: transferred(s, num_features=m),
                TRANSFER_RATES[-1:],
            ),
        )
    },
    "rope after, no offsets": (rotary("after", False), TRANSFER_RATES[-1:], "h64"),
    "rope after, offsets": (rotary("after", True), TRANSFER_RATES[-1:], "h64"),
    "rope before, offsets": (rotary("before", True), TRANSFER_RATES[-1:], "h64"),
    "h256: exact": (lambda setting: setting.exact(), (), "h256"),
    "h256: performer": (performer, (), "h256"),
    "h256: scale": (untrained("scale"), (), "h256"),
    "h256: spectral, closed form": (untrained("spectral", refine=False), (), "h256"),
    "h256: spectral": (untrained("spectral"), (), "h256"),
    "h256: clusters": (untrained("clusters"), (), "h256"),
    "h256: spectral + transfer": (transferred, TRANSFER_RATES[-1:], "h256"),
}
