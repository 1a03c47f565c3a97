"""KerasHub models with linear attention. Importing this imports keras_hub."""

try:
    import keras_hub  # noqa: F401
except ImportError as error:
    raise ImportError(
        "`keras_darkformer.hub` needs KerasHub: pip install 'keras-darkformer[hub]'"
    ) from error

from keras_darkformer.hub.attention import DarkGemma3Attention, DarkGemmaAttention
from keras_darkformer.hub.backbone import DarkGemma3Backbone, DarkGemmaBackbone
from keras_darkformer.hub.causal_lm import DarkGemma3CausalLM, DarkGemmaCausalLM
from keras_darkformer.hub.conversion import convert_to_dark
from keras_darkformer.hub.report import ConversionReport, conversion_report

__all__ = [
    "ConversionReport",
    "DarkGemma3Attention",
    "DarkGemma3Backbone",
    "DarkGemma3CausalLM",
    "DarkGemmaAttention",
    "DarkGemmaBackbone",
    "DarkGemmaCausalLM",
    "conversion_report",
    "convert_to_dark",
]
