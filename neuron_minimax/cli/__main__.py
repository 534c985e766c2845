"""`python -m neuron_minimax.cli` is `neuron-minimax`."""

import sys

from neuron_minimax.cli import main

sys.exit(main())
