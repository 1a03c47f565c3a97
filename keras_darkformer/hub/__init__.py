"""KerasHub models with linear attention.

Import this before loading a dark model: `import keras_darkformer.hub`. It registers the dark
classes with Keras and imports keras_hub.
"""

try:
    import keras_hub  # noqa: F401
except ImportError as error:
    raise ImportError(
        "`keras_darkformer.hub` needs KerasHub: pip install 'keras-darkformer[hub]'"
    ) from error

from typing import TYPE_CHECKING, Any

import keras_darkformer.hub.layers  # noqa: F401  registers them
from keras_darkformer.hub.conversion import DARK_CLASSES, convert_to_dark
from keras_darkformer.hub.presets import upload_preset
from keras_darkformer.hub.report import conversion_report
from keras_darkformer.hub.stream import Stream

globals().update(DARK_CLASSES)
if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


__all__ = ["Stream", "conversion_report", "convert_to_dark", "upload_preset"]
__all__ += sorted(DARK_CLASSES)
