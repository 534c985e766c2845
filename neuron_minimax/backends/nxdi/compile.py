"""The process that compiles: `python -m neuron_minimax.backends.nxdi.compile MODEL GRAPHS`, its
output is the log.
"""

import json
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Compile the converted directory MODEL into GRAPHS, by the options.json that is there."""
    from neuron_minimax.backends.nxdi.application import compile_application, make_application
    from neuron_minimax.backends.nxdi.backend import OPTIONS_NAME
    from neuron_minimax.backends.nxdi.options import parse
    from neuron_minimax.errors import NeuronMiniMaxError

    model, graphs = (Path(argument) for argument in (argv or sys.argv[1:]))
    try:
        options = parse(json.loads((graphs / OPTIONS_NAME).read_text(encoding="utf-8")))
        compile_application(make_application(model, options), graphs)
    except NeuronMiniMaxError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
