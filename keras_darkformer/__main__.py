"""`python -m keras_darkformer`."""

import sys

from keras_darkformer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
