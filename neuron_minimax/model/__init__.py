"""The decoder of every family in torch, over converted checkpoints."""
