"""The mark that distinguishes weights of dark attention from those of softmax in a file."""

from typing import Any

import numpy as np

from keras_darkformer.surgery.become import give
from keras_darkformer.types import Layer

# Its name in a file of weights.
MARK = "dark_attention"


def mark_weights(dense: Layer) -> None:
    """Marks the weights of a projection as those of dark attention.

    A stock layer refuses marked weights. Without the mark it would load them, since a dark layer
    has all the weights that it looks for. The mark is on a projection because Keras looks for a
    layer's weights in every place where a model holds the layer. A stock attention layer has no
    weights of its own, so it accepts finding nothing in the second place; a projection does not.
    The mark is set on the object, not by a subclass, as Keras does not quantize layers of a
    subclass.
    """
    save, load = dense.save_own_variables, dense.load_own_variables

    def save_marked(store: Any) -> None:
        save(store)
        store[MARK] = np.ones((), "int8")

    def load_marked(store: Any) -> None:
        load({name: store[name] for name in store.keys() - {MARK}})

    give(dense, save_own_variables=save_marked, load_own_variables=load_marked)
