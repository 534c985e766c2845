"""The one directory of all benchmarks: checkpoints, conversions, compiled models, each made once.

DIR/checkpoints/NAME   written by synthetic.py
DIR/converted/NAME     its conversion
DIR/traced/NAME-...    compiled models
DIR/scratch            whatever a benchmark writes and removes again
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.synthetic import real_layers, write_synthetic

DEFAULT = Path(tempfile.gettempdir()) / "neuron-minimax-bench"
# The checkpoint of most benchmarks: real layer dimensions, 2.0 GB in FP8.
REAL = ("2-of-62-layers-64-experts", real_layers())


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a benchmark's parser: every one takes the same --directory."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=DEFAULT,
        help=f"what is made once is kept here (default: {DEFAULT})",
    )
    return parser


def checkpoint(directory: Path, name: str, config_json: dict[str, Any]) -> Path:
    return write_synthetic(directory / "checkpoints" / name, config_json)


def converted(directory: Path, name: str, config_json: dict[str, Any]) -> Path:
    """Return the conversion of a checkpoint; converting again recognizes what is there."""
    from neuron_minimax.checkpoint.reader import Checkpoint
    from neuron_minimax.convert.plan import plan_conversion

    output = directory / "converted" / name
    source = Checkpoint.open(checkpoint(directory, name, config_json))
    plan_conversion(source).write(output)
    return output


def compiled(
    directory: Path, name: str, config_json: dict[str, Any], suffix: str, **options: Any
) -> Path:
    """Return a model compiled with these options of the CPU backend.

    It is compiled again only when the backend's code has changed.
    """
    from neuron_minimax.backends import compile_model

    traced = directory / "traced" / f"{name}-{suffix}"
    compile_model(converted(directory, name, config_json), traced, options=options)
    return traced


def empty_scratch(directory: Path) -> Path:
    scratch = directory / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    return scratch
