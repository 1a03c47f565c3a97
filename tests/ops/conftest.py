import pytest


@pytest.fixture(autouse=True)
def seeded():
    """Nothing here draws from global seeds, and Keras imports TensorFlow to set them."""
