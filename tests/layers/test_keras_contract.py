"""What Keras asks of its own layers: serialization, symbolic calls, training, precision."""

import pytest
from keras.src.testing import TestCase

from keras_darkformer import DarkAttention, DarkFeatureMap, DarkTransformerBlock
from keras_darkformer.layers import ExponentialFeatureMap

HEADS = {"head_dim": 4, "num_query_heads": 4, "num_key_value_heads": 2, "num_features": 8}


@pytest.mark.slow
class ContractTest(TestCase):
    def test_dark_attention_is_a_keras_layer(self):
        self.run_layer_test(
            DarkAttention,
            init_kwargs=HEADS | {"seed": 0, "dropout": 0.1},
            input_shape={"query_shape": (2, 7, 16), "value_shape": (2, 5, 16)},
            expected_output_shape=(2, 7, 16),
            expected_num_trainable_weights=9,
            expected_num_non_trainable_weights=5,
            expected_num_seed_generators=1,
            expected_num_losses=0,
            supports_masking=True,
            run_training_check=False,
        )

    def test_dark_feature_map_is_a_keras_layer(self):
        self.run_layer_test(
            DarkFeatureMap,
            init_kwargs={"num_heads": 2, "head_dim": 4, "num_features": 8},
            input_shape=(2, 7, 2, 4),
            expected_output_shape=(2, 7, 2, 8),
            expected_output_dtype="float32",
            expected_num_trainable_weights=1,
            expected_num_non_trainable_weights=5,
            expected_num_seed_generators=0,
            expected_num_losses=0,
        )

    def test_exponential_feature_map_is_a_keras_layer(self):
        self.run_layer_test(
            ExponentialFeatureMap,
            init_kwargs={"num_heads": 2, "head_dim": 4, "num_features": 8},
            input_shape=(2, 7, 2, 4),
            expected_output_shape=(2, 7, 2, 8),
            expected_output_dtype="float32",
            expected_num_trainable_weights=3,
            expected_num_non_trainable_weights=0,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            run_training_check=False,  # queries leave the weights of keys without a gradient
        )

    def test_dark_transformer_block_is_a_keras_layer(self):
        self.run_layer_test(
            DarkTransformerBlock,
            init_kwargs={
                "intermediate_dim": 24,
                "num_heads": 4,
                "num_features": 8,
                "rope_max_wavelength": 100.0,
                "seed": 0,
            },
            input_shape=(2, 7, 16),
            expected_output_shape=(2, 7, 16),
            expected_num_trainable_weights=17,
            expected_num_non_trainable_weights=5,
            expected_num_losses=0,
            supports_masking=True,
        )
