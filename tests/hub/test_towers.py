"""KerasHub's models of images and sounds, asked what families of texts are asked."""

import json

import keras
import keras_hub
import numpy as np
import pytest
from backends import BACKEND, on_one_backend, to_numpy
from fresh_process import run_python
from keras_hub.layers import TransformerDecoder

from keras_darkformer import conversion_report, convert_to_dark, hub
from keras_darkformer.hub.families import TOWERS
from keras_darkformer.layers.core import FeatureAttention

from .family_checks import BY_NAME, CHECKS, Case, close
from .models import OWN, TOWER_ROWS, body, outputs, tower, tower_inputs

pytestmark = pytest.mark.filterwarnings("ignore:Converting")

NAMES = tuple(tower.name for tower in TOWERS)
OF_ALL = ("exact mode = source", "kernel = reference", "paths and report", "preset")
OF_KINDS = (".keras", "fit", "stock preset", "calibrate, transfer, report")
# They are wired alike on all backends. ViT has its blocks in a layer that makes them, Whisper has
# cached attention, and Moonshine rotates.
KINDS = ("ViT", "Whisper")
QUESTIONS = [(name, x) for name in NAMES for x in (*OF_ALL, *(OF_KINDS if name in KINDS else ()))]
if BACKEND != "torch":
    QUESTIONS = [("ViT", x) for x in ("exact mode = source", "kernel = reference", "fit")]
    QUESTIONS += [("Moonshine", "exact mode = source")]


if BACKEND == "torch":
    QUESTIONS += [("cross-attention", "exact mode = source"), ("TransformerDecoder", "fit")]


@pytest.fixture(scope="module")
def case(request):
    return Case((BY_NAME | OWN)[request.param])


@pytest.mark.parametrize(("case", "check"), QUESTIONS, indirect=["case"], ids=str)
def test_a_tower_does(case, check, few_steps):
    CHECKS[check](case)


def dark_layers_of(model):
    return [x for x in model._flatten_layers() if isinstance(x, FeatureAttention)]


@on_one_backend
def test_what_is_no_self_attention_of_an_encoder_is_left():
    """The head of SigLIP, whose only query is linear in time, and decoders."""
    for name in ("SigLIPVision", "Whisper"):
        model = convert_to_dark(tower(name), num_features=8)
        assert len(dark_layers_of(model)) == 2 == len(conversion_report(model)["layers"])
    whisper = body(model)
    assert not any(dark_layers_of(x) for x in whisper.decoder_transformer_layers)
    assert all(isinstance(x, TransformerDecoder) for x in whisper.decoder_transformer_layers)


@on_one_backend
@pytest.mark.parametrize("name", ["CLIPVision", "DINOV2"])  # the stock layers of ViT are not
def test_a_model_over_tensors_of_a_tower_is_saved_and_cloned_dark(name, tmp_path):
    tower_of_two = body(convert_to_dark(tower(name), num_features=8))
    model = keras.Model(tower_of_two.input, keras.layers.Dense(2)(tower_of_two.output))
    batch = tower_inputs(tower_of_two)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for again in (loaded, clone):
        assert len(dark_layers_of(again)) == 2
        close(outputs(again, batch), outputs(model, batch), 1e-5)


def clip():
    parts = [keras_hub.models.CLIPVisionEncoder, keras_hub.models.CLIPTextEncoder]
    vision, text = (
        make(num_layers=1, **TOWER_ROWS[name])
        for make, name in zip(parts, ("CLIPVision", "CLIPText"), strict=True)
    )
    return keras_hub.models.CLIPBackbone(vision, text, projection_dim=8)


@on_one_backend
def test_towers_are_converted_by_themselves_where_they_are(tmp_path):
    model = clip()
    with pytest.raises(ValueError, match=r"models in it .*\['clip_vision_enc.*', 'clip_t"):
        convert_to_dark(model)
    assert not dark_layers_of(model)
    for part in (model.vision_encoder, model.text_encoder):
        convert_to_dark(part, num_features=8)
    batch = tower_inputs(model)
    expected = to_numpy(model(batch)["text_logits"])
    model.save_to_preset(tmp_path)
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path))
    assert type(loaded.vision_encoder) is hub.DarkCLIPVisionEncoder
    assert len(dark_layers_of(loaded)) == 2
    close(to_numpy(loaded(batch)["text_logits"]), expected, 1e-5)


@on_one_backend
def test_a_window_needs_causal_attention():
    with pytest.raises(ValueError, match="need causal attention, but ViT attends in both"):
        convert_to_dark(tower("ViT"), sliding_window=4)
    model = convert_to_dark(tower("CLIPText"), num_features=8, sliding_window=4)
    assert np.isfinite(outputs(model, tower_inputs(model))).all()


SESSION = """
    import json, sys
    import keras, keras_hub
    import keras_darkformer.hub
    sys.path.insert(0, "tests")
    from hub.models import outputs, tower_inputs

    folder, *names = sys.argv[1:]
    found = {}
    for name in names:
        models = [keras.saving.load_model(f"{folder}/{name}.keras")]
        models.append(keras_hub.models.Backbone.from_preset(f"{folder}/{name}"))
        output = outputs(models[0], tower_inputs(models[0]))
        found[name] = [type(x).__name__ for x in models], output.tolist()
    print(json.dumps(found))
"""


@pytest.mark.slow
@on_one_backend
def test_a_fresh_process_loads_them_dark(tmp_path):
    models = {name: convert_to_dark(tower(name), num_features=8) for name in ("ViT", "Whisper")}
    for name, model in models.items():
        model.save(tmp_path / f"{name}.keras")
        model.save_to_preset(tmp_path / name)
    found = json.loads(run_python(SESSION, tmp_path, *models).splitlines()[-1])
    for name, model in models.items():
        classes, output = found[name]
        assert classes == [type(model).__name__, type(body(model)).__name__]
        close(np.asarray(output), outputs(model, tower_inputs(model)), 1e-5)
