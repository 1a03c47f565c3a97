"""How stock layers and models of KerasHub and of Keras become dark, in place."""
