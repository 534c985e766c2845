"""Make `python -m neuron_minimax` the command `neuron-minimax`."""

import sys

from neuron_minimax.cli import main

if __name__ == "__main__":
    sys.exit(main())
