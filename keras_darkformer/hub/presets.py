"""Presets of dark models: saved with a model card, and uploaded with it."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import keras_hub

from keras_darkformer.hub.card import model_card
from keras_darkformer.hub.record import NAME, as_json
from keras_darkformer.surgery.become import Mixin

README = "README.md"
HUGGING_FACE = "hf://"
# The last line of a card, which shows that nobody has edited it. As an HTML comment it is not
# displayed.
MARK = "\n<!-- written by keras_darkformer, {}; saving again replaces it until it is edited -->\n"


class Carded(Mixin):
    """A dark model whose presets have a model card."""

    def save_to_preset(self, preset_dir: str | Path, max_shard_size: float | None = 10) -> None:
        """Saves as the stock model does, and writes a model card, `README.md`, beside it.

        A `README.md` that was edited, or was not written here, is left as it is. The record of how
        the model was fitted, its `linearization`, is part of the config. The card shows it, and
        `linearization.json` holds it for other programs.

        Args:
            preset_dir: path of the folder.
            max_shard_size: int or float. Largest size of a weights file in GB; `None` for one file.

        Warns:
            UserWarning: if the card was left as it is or could not be written.
        """
        super().save_to_preset(preset_dir, max_shard_size)
        try:
            written = write_card(self, Path(preset_dir))
        except Exception as error:  # its card must not cost the model
            warnings.warn(f"The model is saved, but its card is not: {error!r}", stacklevel=2)
            return
        # A task saves its backbone into the folder first, which has warned already.
        if not written and not hasattr(self, "backbone"):
            warnings.warn(
                f"{str(Path(preset_dir, README))!r} was edited or not written by keras_darkformer, "
                "and is left as it is. Remove it to get a new one.",
                stacklevel=2,
            )


def upload_preset(uri: str, preset: str | Path) -> None:
    """Uploads a preset as `keras_hub.upload_preset` does, with the model card in it.

    For a Hugging Face repository without a `README.md`, KerasHub writes its own card over the one
    in the folder, uploads it, and removes it from the folder. This function uploads the folder's
    card first, so that the repository has one. For Kaggle both functions do the same.

    Args:
        uri: `"hf://user/model"`, or `"kaggle://user/model/framework/variation"`.
        preset: the folder that `save_to_preset` wrote.

    Example:

        model.save_to_preset("dark")
        keras_darkformer.hub.upload_preset("hf://user/model", "dark")
    """
    card = Path(preset) / README
    if uri.startswith(HUGGING_FACE) and card.is_file():
        import huggingface_hub

        repo = huggingface_hub.create_repo(uri.removeprefix(HUGGING_FACE), exist_ok=True)
        huggingface_hub.upload_file(path_or_fileobj=card, path_in_repo=README, repo_id=repo.repo_id)
    keras_hub.upload_preset(uri, str(preset))


def write_card(model: Any, folder: Path) -> bool:
    """Writes a model's card and record into its preset.

    Returns:
        Whether the card was written: an edited one is left as it is.
    """
    record = folder / f"{NAME}.json"
    if model.linearization is None:
        record.unlink(missing_ok=True)
    else:
        record.write_text(json.dumps(as_json(model.linearization), indent=4), encoding="utf-8")
    path = folder / README
    if path.exists() and not is_unedited(path.read_bytes()):
        return False
    text = model_card(model).encode()
    path.write_bytes(text + _mark(text))
    return True


def is_unedited(card: bytes) -> bool:
    """Whether a card is exactly as it was written here."""
    text, start, _ = card.rpartition(b"\n<!--")
    return card == text + _mark(text) if start else False


def _mark(text: bytes) -> bytes:
    return MARK.format(hashlib.sha256(text).hexdigest()[:16]).encode()
