"""How stock layers and models become dark, in place; for KerasHub's and for Keras' own."""
