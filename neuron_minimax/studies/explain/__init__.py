"""Explanations for people: the architecture, the loading path, and one FP8 block."""
