"""The model card of a preset, and the record of how the model was fitted."""

import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import keras
import keras_hub
import numpy as np
import pytest
from backends import on_one_backend

from keras_darkformer import convert_to_dark, hub
from keras_darkformer.hub.card import model_card

from .models import dark, gemma2, task_of

MEMORY = {"sliding_window": 4, "num_sinks": 2, "cache_size": 3}
RECORD = {
    "model": "GemmaCausalLM",
    "layers": 2,
    "exact_layers": [0],
    "options": {"num_features": 16, "layers": (1,)},
    "data": {"training_tokens": 12345, "length": 512, "description": None},
    "exact": {"text": np.float32(3.55), "lookups": 1.7},
    "stages": [
        {"name": "converted", "seconds": 3.1, "tokens": 0, "text": 4, "lookups": 5.2, "kept": True},
        {"name": "distilled", "seconds": 1333.1, "tokens": 9000, "text": 3.9, "kept": False},
    ],
    "versions": {"keras": "3.15.0", "torch": "2.0"},
}
FILES = ("config.json", "model.weights.h5", "task.json", "tokenizer.json")


@pytest.fixture(scope="module")
def preset(saved, tmp_path_factory):
    """A model with a record, and the preset it was saved to."""
    model = dark(saved.with_tokenizer("Gemma"), layers=[1], **MEMORY)
    model.linearization = RECORD
    folder = tmp_path_factory.mktemp("card") / "preset"
    model.save_to_preset(folder)
    return model, folder


@pytest.fixture
def folder(preset, tmp_path):
    """A copy of the preset."""
    return shutil.copytree(preset[1], tmp_path / "preset")


def saved_again(model, folder):
    """The warnings of saving a model."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model.save_to_preset(folder)
    return [str(x.message) for x in caught if x.category is UserWarning]


def test_the_card_says_what_hugging_face_reads(preset):
    data = huggingface_hub.ModelCard.load(preset[1] / "README.md").data
    assert data.library_name == "keras-hub"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["keras", "linear-attention", "darkformer"]


def test_the_card_says_what_was_converted(preset):
    model, folder = preset
    card = (folder / "README.md").read_text()
    assert "# DarkGemmaCausalLM\n" in card
    assert "`keras_hub.models.GemmaCausalLM`" in card
    assert "1 of 2 layers" in card
    assert "| 0 | exact softmax |" in card
    state = keras.tree.flatten(model.get_initial_cache(1, 8)[1])
    size = 4 * sum(np.prod(leaf.shape) for leaf in state) / 1024
    assert re.search(rf"\| 1 \| linear \| 16 random features .* \| {size:.1f} KiB \|", card)
    for size, name in ((4, "sliding_window"), (2, "num_sinks"), (3, "cache_size")):
        assert re.search(rf" {size}[ a-z]* \(`{name}`\)", card)


def test_the_card_says_how_it_was_fitted_and_with_what(preset):
    card = (preset[1] / "README.md").read_text()
    for line in (
        "| after | text | lookups | tokens | seconds | kept |",
        "| the source, exact | 3.550 | 1.700 |  |  |  |",
        "| converted | 4.000 | 5.200 | 0 | 3 | yes |",
        "| distilled | 3.900 |  | 9,000 | 1,333 | no |",
        "| `training_tokens` | 12345 |",
        "| `layers` | [1] |",
        f"| keras | 3.15.0 | {keras.__version__} |",
        f"| keras_hub |  | {keras_hub.__version__} |",
    ):
        assert f"\n{line}\n" in card
    assert "description" not in card


def test_layers_that_differ_have_lines_of_their_own_and_what_is_dropped_is_said():
    with pytest.warns(UserWarning, match="drops from layers"):
        model = convert_to_dark(
            gemma2(num_layers=6), layers=[1, 2, 3, 5], num_features=[8, 4, 8, 8]
        )
    card = model_card(model)
    assert re.search(r"\| 0, 4 \| exact softmax ", card)
    assert re.search(r"\| 1, 3, 5 \| linear \| 8 ", card)
    assert re.search(r"\| 2 \| linear \| 4 ", card)
    assert "- sliding window of 4 tokens, in layers 2. " in card
    assert "No token is kept exactly." in card
    assert "no record of it" in card
    assert "generate" not in card  # which takes a tokenizer


def test_the_card_of_an_encoder():
    model = dark(task_of("Bert"))
    model.linearization = {"stages": [{"name": "calibrated", "cosine": 0.9123}]}
    for part, kind in ((model, "TextClassifier"), (model.backbone, "Backbone")):
        card = model_card(part)
        assert ("pipeline_tag: text-classification" in card) == (part is model)
        assert f"keras_hub.models.{kind}.from_preset" in card
        assert "| after | cosine | tokens |" in card
        assert "| calibrated | 0.912 |  |" in card
        assert "KiB" not in card
        assert "cache" not in card


@pytest.mark.parametrize("kind", ["CausalLM", "Backbone"])
@pytest.mark.parametrize("place", ["folder", "handle"])
def test_the_record_is_loaded_and_saved_again(preset, tmp_path, monkeypatch, kind, place):
    """By KerasHub's own classes, which know nothing of it, from a repository too."""

    def download(repo_id, filename):
        assert repo_id == "user/model"
        if not (preset[1] / filename).exists():
            raise huggingface_hub.utils.EntryNotFoundError(filename)
        return str(preset[1] / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    name = str(preset[1]) if place == "folder" else "hf://user/model"
    model = getattr(keras_hub.models, kind).from_preset(name, load_weights=False)
    record = json.loads((preset[1] / "linearization.json").read_text())
    assert record["stages"] == RECORD["stages"]
    assert model.linearization == record
    model.save_to_preset(tmp_path)
    assert json.loads((tmp_path / "linearization.json").read_text()) == record
    if kind == "CausalLM":
        assert (tmp_path / "README.md").read_bytes() == (preset[1] / "README.md").read_bytes()


def test_a_task_and_its_backbone_share_the_record(preset):
    model, _ = preset
    assert model.linearization is model.backbone.linearization is RECORD
    try:
        model.backbone.linearization = other = {"stages": []}
        assert model.linearization is other
        for wrong in ({"stages": {print}}, ["stages"]):
            with pytest.raises(ValueError, match="`linearization` must be a dict"):
                model.linearization = wrong
        assert model.linearization is other
    finally:
        model.linearization = RECORD


def test_a_model_without_a_record_leaves_none_of_an_earlier_one(preset, folder):
    model, _ = preset
    try:
        model.linearization = None
        assert saved_again(model, folder) == []
    finally:
        model.linearization = RECORD
    assert not (folder / "linearization.json").exists()
    assert "no record of it" in (folder / "README.md").read_text()
    assert "linearization" not in (folder / "config.json").read_text()


@pytest.mark.parametrize("edit", ["another", "above the mark", "below the mark"])
def test_a_card_that_was_edited_is_left_with_one_warning(preset, folder, edit):
    path = folder / "README.md"
    card = path.read_text()
    path.write_text(
        {
            "another": "# My model\n",
            "above the mark": card.replace("# DarkGemma", "# My Gemma"),
            "below the mark": card + "It is mine.\n",
        }[edit]
    )
    mine = path.read_bytes()
    (warning,) = saved_again(preset[0], folder)
    assert "README.md' was edited" in warning
    assert path.read_bytes() == mine
    path.unlink()
    assert saved_again(preset[0], folder) == []
    assert path.read_text() == card


def test_a_model_is_saved_where_its_card_can_not_be_written(preset, tmp_path, monkeypatch):
    monkeypatch.setitem(RECORD, "stages", "none")
    assert "its card is not" in saved_again(preset[0], tmp_path)[0]
    assert all((tmp_path / name).exists() for name in FILES)


class Repository:
    """Stands for a repository on the Hugging Face Hub."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        for name in ("create_repo", "file_exists", "upload_file", "upload_folder"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))

    def create_repo(self, repo_id, exist_ok):
        assert (repo_id, exist_ok) == ("model", True)
        self.folder.mkdir(exist_ok=True)
        return SimpleNamespace(repo_id="user/model")

    def file_exists(self, repo_id, filename):
        assert repo_id == "user/model"
        return (self.folder / filename).exists()

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
        assert repo_id == "user/model"
        shutil.copy(path_or_fileobj, self.folder / path_in_repo)

    def upload_folder(self, repo_id, folder_path):
        assert repo_id == "user/model"
        shutil.copytree(folder_path, self.folder, dirs_exist_ok=True)


@pytest.mark.parametrize("upload", [hub.upload_preset, keras_hub.upload_preset])
def test_the_card_is_uploaded_to_hugging_face(folder, tmp_path, monkeypatch, upload):
    repository = Repository(tmp_path / "repository", monkeypatch)
    card = (folder / "README.md").read_bytes()
    upload("hf://model", str(folder))
    for name in (*FILES, "linearization.json"):
        assert (repository.folder / name).read_bytes() == (folder / name).read_bytes()
    kept = upload is hub.upload_preset
    # KerasHub alone replaces it, and removes it here. If this fails, ours is needed no more.
    assert ((repository.folder / "README.md").read_bytes() == card) == kept
    assert (folder / "README.md").exists() == kept


def test_the_card_is_uploaded_to_kaggle(folder, monkeypatch):
    import kagglehub

    uploaded = {}

    def model_upload(handle, path):
        uploaded[handle] = {x.name: x.read_bytes() for x in Path(path).iterdir() if x.is_file()}

    monkeypatch.setattr(kagglehub, "model_upload", model_upload)
    hub.upload_preset("kaggle://user/model/keras/dark", folder)
    (files,) = uploaded.values()
    assert {*FILES, "README.md", "linearization.json"} <= files.keys()
    assert files["README.md"] == (folder / "README.md").read_bytes()


def test_a_folder_that_is_no_preset_is_refused_before_a_repository_is_made(tmp_path, monkeypatch):
    Repository(tmp_path / "repository", monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"nowhere doesn't exist"):
        hub.upload_preset("hf://model", tmp_path / "nowhere")
    assert not (tmp_path / "repository").exists()


@pytest.mark.slow
@on_one_backend
def test_the_code_in_a_card_runs(preset, capsys):
    card = (preset[1] / "README.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {"texts": ["the left hand", "a right hand of it"]}
    exec(first.replace("hf://USER/MODEL", str(preset[1])).replace("256", "12"), names)
    exec(second, names)
    assert names["model"].linearization is not None
    printed = capsys.readouterr().out
    assert "nce upon a t" in printed  # the tokenizer knows no capitals
    assert "Attention against exact softmax" in printed
    assert "loss: " in printed
