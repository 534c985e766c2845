"""MiniMax-M2 in torch over the converted checkpoint."""
