"""Experts that a model chooses: traces, statistics, plots, and placements on ranks."""
