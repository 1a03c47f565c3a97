from hub.conftest import (  # noqa: F401
    preprocessor,
    quick_backend,
    sentencepiece_proto,
    texts,
)
