"""Compiled models: what they promise, and how one is found again from its directory."""
