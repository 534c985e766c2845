"""Decide what fits on an instance and which settings cannot work, before any compile; no torch."""
