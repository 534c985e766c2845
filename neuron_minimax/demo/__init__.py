"""The embedded demo model, a checkpoint of the published format; README.md is its model card."""

from pathlib import Path

DEMO = Path(__file__).parent
