"""The mark that tells weights of dark attention from those of softmax attention in a file."""

from typing import Any

import numpy as np

from keras_darkformer.surgery.become import give
from keras_darkformer.types import Layer

# Its name in a file of weights.
MARK = "dark_attention"


def mark_weights(dense: Layer) -> None:
    """Marks the weights of a projection as those of dark attention.

    A stock layer refuses marked weights. Without a mark it would load them, as it finds all of its
    own among those of a dark layer. The mark is on a projection because Keras looks for a layer's
    weights in all places that a model holds it at: a stock attention layer, which has none of its
    own, is content with nothing at the second place, and a projection is not. It is set on the
    object, as Keras does not quantize layers of a subclass.
    """
    save, load = dense.save_own_variables, dense.load_own_variables

    def save_marked(store: Any) -> None:
        save(store)
        store[MARK] = np.ones((), "int8")

    def load_marked(store: Any) -> None:
        load({name: store[name] for name in store.keys() - {MARK}})

    give(dense, save_own_variables=save_marked, load_own_variables=load_marked)
