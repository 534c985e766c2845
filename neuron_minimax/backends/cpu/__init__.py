"""The CPU backend: eager, exported and compiled engines."""
