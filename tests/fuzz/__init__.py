"""Mutated inputs to everything that reads a file or a request of somebody else's."""
